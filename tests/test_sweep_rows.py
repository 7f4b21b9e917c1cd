"""Rows as they are asked for, and which of them get a control."""

import pytest

from domainbed import registry
from domainbed.sweep_rows import SweepRow, budget_args, merged_hparams, parse_budget, with_controls

OFF = {"weight": 0.0, "ramp": 0}


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    """Penal has a control, Plain and Own (which trains by group) have none."""
    facts = {"Penal": {"CONTROL": OFF}, "Plain": {"CONTROL": {}}, "Own": {"PARTITION": "group"}, "Data": {}}

    def attribute(package, name, attribute, default=None):
        if name not in facts:
            raise NotImplementedError(f"{package}: {name}")
        return facts[name].get(attribute, default)

    monkeypatch.setattr(registry, "attribute", attribute)


def test_hparams_of_rows_lie_over_the_sweeps():
    assert merged_hparams('{"b":1}', None) == '{"b":1}'  # as typed
    assert merged_hparams('{"c": 1, "b": 1}', {"b": 2, "a": 3}) == '{"a": 3, "b": 2, "c": 1}'
    assert merged_hparams(None, {"a": True}) == '{"a": true}'
    assert merged_hparams(None, {}) is None


def test_names():
    entries = ("Own", "Own:group", "Own:random", "Plain:environment", "Plain:group")
    assert [SweepRow.parse(entry).name for entry in entries] == ["Own", "Own", "Own:random", "Plain", "Plain:group"]


def test_a_control_keeps_everything_but_label_and_penalty():
    row = SweepRow("Penal", "group", hparams={"weight": 3.0, "lr": 1}, ranges={"lr": "U(0, 1)"})
    assert with_controls([row], True) == [
        row,
        SweepRow("Penal", "group", "Penal:group, control", {"lr": 1, **OFF}, {"lr": "U(0, 1)"}),
    ]


def test_labels_of_controls():
    rows = [SweepRow("Penal"), SweepRow("Penal", label="mine")]
    assert [row.label for row in with_controls(rows, True)] == [None, "Penal, control", "mine", "mine, control"]
    assert with_controls(rows[:1], True, label="sweep's")[1].label == "sweep's, control"


def test_a_row_says_for_itself_whether_it_wants_a_control():
    rows = [SweepRow("Penal", "random", control=False), SweepRow("Penal", control=True), SweepRow("Penal", "group")]
    assert [row.partition for row in with_controls(rows, False) if row.hparams] == [None]
    assert [row.partition for row in with_controls(rows, True) if row.hparams] == [None, "group"]


@pytest.mark.parametrize(
    ("own", "common"),
    [(OFF, None), ({"ramp": 0}, '{"weight": 0}'), ({**OFF, "lr": 1}, None), ({}, '{"weight": 0, "ramp": 0}')],
)
def test_a_control_has_no_control(own, common):
    rows = [SweepRow("Penal", hparams=own)]
    assert with_controls(rows, True, common) == rows


@pytest.mark.parametrize("own", [{"weight": 0.0}, {"weight": 0.0, "ramp": 5}])
def test_half_a_control_is_none(own):
    assert len(with_controls([SweepRow("Penal", hparams=own)], True)) == 2


def test_no_controls_to_be_had():
    rows = [SweepRow("Plain"), SweepRow("Own")]
    assert with_controls(rows, False) == rows
    with pytest.raises(ValueError, match="none of Own, Plain has one; leave out --controls"):
        with_controls(rows, True)
    with pytest.raises(ValueError, match="none of Plain has one"):
        with_controls([SweepRow("Penal"), SweepRow("Plain", control=True)], False)


def test_what_a_row_says_of_a_dataset():
    row = SweepRow("Plain", hparams={"a": 1, "b": 1}, on={"Data": {"hparams": {"b": 2}}})
    assert row.on_dataset("Data").hparams == {"a": 1, "b": 2}
    assert row.on_dataset("Other").hparams == {"a": 1, "b": 1}
    with pytest.raises(NotImplementedError, match="Dta"):
        SweepRow("Plain", on={"Dta": {}}).on_dataset("Data")


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("0", {"annotation_budget": 0, "validation_budget": 0}),
        ("5e-2", {"annotation_budget": 0.05, "validation_budget": 0.05}),
        ("0.05,1", {"annotation_budget": 0.05}),
        ("1, .2", {"validation_budget": 0.2}),
        ("1", {}),
        ("1.0,1", {}),
    ],
)
def test_budgets_as_arguments_of_train(text, args):
    assert budget_args(parse_budget(text)) == args


@pytest.mark.parametrize("text", ["", "5 %", "1.01", "-0.1", "nan", "0,1,1", "0.5,", "0.5,2", "True"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match=r"is no share from 0 to 1, nor two: training,validation"):
        parse_budget(text)


def test_confounders_and_budgets_of_a_row():
    row = SweepRow("Own", confounders=["inferred:george"], budgets=[(0, 1)])
    assert row.train_args(None) == {"algorithm": "Own", "confounders": ["inferred:george"]}
    assert row.on_dataset("Data").budgets == [(0, 1)]
    control = with_controls([SweepRow("Penal", confounders=["sex"], budgets=[(0, 0)])], True)[1]
    assert (control.budgets, control.confounders) == ([(0, 0)], ["sex"])
