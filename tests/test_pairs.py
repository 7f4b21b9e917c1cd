import json

import pytest

from domainbed import pairs
from domainbed.rows import Row, meeting, runs

OFF = '{"map_gradient": "none"}'


def record(algorithm="EX2L_MAE", dataset="DigitsM2M", step=0, test=0.5, val=0.5, **args):
    seeds = {"trial_seed": 0, "hparams_seed": 0, "seed": 0}
    values = {}
    for split, accuracy in {"env1_in": test, "env0_out": val}.items():
        values |= {f"{split}_acc": accuracy, f"{split}_wga": accuracy}
        values |= {f"{split}_g0_acc": accuracy, f"{split}_g0_n": 4}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": [1], **seeds, **args}
    return {"args": run, "step": step, **values}


def row(**args):
    return Row.of({"algorithm": "EX2L_MAE", **args})


class TestControlOf:
    def test_lays_the_literal_over_the_other_hparams(self):
        tuned = row(hparams='{"lambda_2": 0.3, "map_gradient": "full"}', ranges='{"lr": "10^U(-4, -2)"}', label="mine")
        control = pairs.control_of(tuned)
        extras = {name: json.loads(value) for name, value in control.extras}
        assert (control.algorithm, control.partition, control.label) == ("EX2L_MAE", tuned.partition, None)
        assert extras | {"ranges": None} == {"lambda_2": 0.3, "map_gradient": "none", "ranges": None}
        assert dict(control.extras)["ranges"] == dict(tuned.extras)["ranges"]

    def test_neither_a_control_nor_an_algorithm_without_one_has_a_control(self):
        assert pairs.control_of(row(hparams=OFF)) is None
        assert pairs.control_of(Row.of({"algorithm": "ERM"})) is None
        flags = [pairs.is_control(r) for r in (row(hparams=OFF), row(), Row.of({"algorithm": "ERM"}))]
        assert flags == [True, False, False]


class TestWithControls:
    def found(self, *rows):
        return [(a.name, b.name) for a, b, _ in pairs.with_controls({("DigitsM2M", (1,)): rows})]

    def test_a_number_is_the_same_however_it_is_written(self):
        off = Row.of({"algorithm": "GroupDRO", "partition": "group", "hparams": '{"groupdro_eta": 0}'})
        method = Row.of({"algorithm": "GroupDRO", "partition": "group"})
        assert pairs.is_control(off)
        assert [b for _, b, _ in pairs.with_controls({("DigitsM2M", (1,)): (method, off)})] == [off]

    def test_labels_may_differ(self):
        assert self.found(row(), row(hparams=OFF, label="off")) == [("EX2L_MAE", "off")]
        assert self.found(row(label="on"), row(hparams=OFF)) == [("on", "EX2L_MAE map_gradient=none")]

    def test_of_several_controls_that_with_the_rows_label(self):
        controls = row(hparams=OFF, label="a"), row(hparams=OFF, label="b")
        assert self.found(row(label="a"), *controls) == [("a", "a")]
        assert self.found(row(label="c"), *controls) == [("c", "a"), ("c", "b")]

    @pytest.mark.parametrize(
        "other",
        [
            {"partition": "random"},
            {"hparams": '{"map_gradient": "none", "lambda_2": 1}'},
            {"precision": "bf16"},
            {"ranges": '{"lr": "10^U(-4, -2)"}'},
            {"algorithm": "EX2L_Cosine"},
        ],
    )
    def test_all_else_must_be_equal(self, other):
        assert self.found(row(), row(**{"hparams": OFF, **other})) == []

    def test_only_where_both_were_trained(self):
        met = {("DigitsM2M", (1,)): [row()], ("DigitsO2O", (1,)): [row(hparams=OFF)]}
        assert pairs.with_controls(met) == []


def paired(records, view="aa_wga", any_seed=False, second=OFF):
    """(test accuracy of the first row, of the second) of each pair, and how many trials are left over."""
    other = Row.of({"algorithm": "ERM"}) if second is None else row(hparams=second)
    found = {v.name: v for v in pairs.views(records)}[view]
    (cell,) = meeting(runs(records))
    pairing = pairs.pair(found, row(), other, cell, any_seed)
    return pairing and ([(a.test.aa, b.test.aa) for a, b in pairing.pairs], pairing.unpaired)


class TestPair:
    def test_one_draw_goes_by_seed_not_by_rank(self):
        records = [record(seed=seed, test=seed / 100) for seed in (42, 8, 77)]
        records += [record(seed=seed, test=seed / 1000, hparams=OFF) for seed in (77, 42, 5)]
        assert paired(records) == ([(0.42, 0.042), (0.77, 0.077)], 2)

    def test_trials_are_not_mixed(self):
        records = [record(trial_seed=trial, test=0.1 + trial / 10) for trial in (0, 1, 2)]
        records += [record(trial_seed=trial, test=0.5 + trial / 10, hparams=OFF) for trial in (2, 1)]
        assert paired(records) == ([pytest.approx((0.2, 0.6)), pytest.approx((0.3, 0.7))], 1)

    def test_where_draws_compete_the_trial_is_the_pair(self):
        draws = {"": [0.6, 0.9], OFF: [0.9, 0.6]}  # validation takes another draw for each
        records = [
            record(hparams=hparams, hparams_seed=draw, seed=10 + draw, val=val, test=val / 2)
            for hparams, vals in draws.items()
            for draw, val in enumerate(vals)
        ]
        assert paired(records) == ([(0.45, 0.45)], 0)
        (found, _, last, oracle) = pairs.views(records)
        (cell,) = meeting(runs(records))
        pairing = pairs.pair(found, row(), row(hparams=OFF), cell)
        assert [pairing.differing(name) for name in ("hparams_seed", "seed", "trial_seed", "step")] == [1, 1, 0, 0]
        assert pairs.pair(last, row(), row(hparams=OFF), cell) is None  # nothing was fixed in advance
        assert oracle.name == pairs.ORACLE

    def test_the_oracle_goes_by_the_test_environments_alone(self):
        records = [
            record(step=step, val=val, test=test, hparams=hparams)
            for hparams in ("", OFF)
            for step, val, test in ((10, 0.9, 0.2), (20, 0.1, 0.4), (30, 0.5, 0.3))
        ]
        assert paired(records, pairs.ORACLE) == ([(0.4, 0.4)], 0)

    def test_one_draw_of_another_number_is_no_partner(self):
        records = [record(hparams_seed=1), record(hparams_seed=2, hparams=OFF)]
        assert paired(records) == ([], 2)

    def test_last_step_looks_at_no_validation(self):
        records = [
            record(step=step, val=val, test=test, hparams=hparams)
            for hparams in ("", OFF)
            for step, val, test in ((10, 0.9, 0.2), (30, 0.1, 0.4), (20, 0.5, 0.3))
        ]
        assert paired(records) == ([(0.2, 0.2)], 0)
        assert paired(records, pairs.LAST_STEP) == ([(0.4, 0.4)], 0)

    def test_two_algorithms_go_by_seed_where_some_are_equal_else_by_rank(self):
        ours = [record(seed=seed, test=seed / 100) for seed in (30, 20)]
        theirs = [record("ERM", seed=seed, test=seed / 1000) for seed in (30, 50)]
        assert paired(ours + theirs, any_seed=True, second=None) == ([(0.3, 0.03)], 2)
        assert paired(ours + theirs[1:], any_seed=True, second=None) == ([(0.2, 0.05)], 1)
        assert paired(ours + theirs[1:], second=None) == ([], 3)
