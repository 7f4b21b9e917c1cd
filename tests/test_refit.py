"""Which draws a search's records say to train again, and with what; against hand-made records."""

import json

import pytest

from domainbed import refit, registry
from domainbed.jobs import make_args_list, make_jobs
from domainbed.sweep_rows import SweepRow

OFF = {"weight": 0.0}


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    """Penal trains by group and has a control, Plain has none; both datasets are split by ourselves."""
    facts = {
        "Penal": {"CONTROL": OFF, "PARTITION": "group", "UNREAD_HPARAMS": ("unread",)},
        "Plain": {},
        "One": {"ENVIRONMENTS": ("a", "b", "c"), "TEST_ENVS": (0,), "CONFOUNDERS": ("x", "y")},
        "Two": {"ENVIRONMENTS": ("a", "b", "c"), "TEST_ENVS": (2,), "CONFOUNDERS": ("x", "y")},
    }
    monkeypatch.setattr(
        registry, "attribute", lambda _, name, attribute, default=None: facts[name].get(attribute, default)
    )
    monkeypatch.setattr(registry, "order", lambda package: ())


def record(score, step=0, drawn=None, dataset="One", algorithm="Penal", hparams=None, groups=True, **args):
    """A checkpoint whose validation AA and WGA are both ``score``; hparams are the explicit ones, drawn the others."""
    test_env = 0 if dataset == "One" else 2
    splits = [(env, split) for env in range(3) for split in ("in", "out")]
    measured = {f"env{env}_{split}_acc": score for env, split in splits}
    for env, split in splits if groups else ():
        measured |= {f"env{env}_{split}_wga": score, f"env{env}_{split}_g0_acc": score, f"env{env}_{split}_g0_n": 10}
    seeds = {"trial_seed": 0, "hparams_seed": 0}
    defaults = {"partition": "group", "holdout_fraction": 0.2, "steps": None, "skip_model_save": False}
    args = {"algorithm": algorithm, "dataset": dataset, "test_envs": [test_env], "output_dir": "d/1",
            "hparams": json.dumps(hparams) if hparams else None, **seeds, **defaults, **args}  # fmt: skip
    args.setdefault("seed", 1000 + args["hparams_seed"] + 100 * args["trial_seed"])
    return {
        "step": step,
        "args": args,
        "hparams": {"lr": 0.1, "weight": 1.0, **(drawn or {}), **(hparams or {})},
        **measured,
    }


def facts(draws):
    return [
        (d.name, d.choice.run.dataset, d.choice.run.trial_seed, d.choice.run.hparams_seed, d.choice.step) for d in draws
    ]


def test_the_best_draw_over_all_steps_draws_and_trials():
    records = [
        record(0.5), record(0.6, step=10), record(0.7, hparams_seed=1), record(0.4, hparams_seed=1, step=10),
        record(0.8, trial_seed=1, hparams_seed=2, step=10), record(0.2, trial_seed=1, hparams_seed=2, step=20),
        record(0.3, dataset="Two", hparams_seed=5), record(0.1, dataset="Two", hparams_seed=1),
        record(0.4, algorithm="Plain", hparams_seed=3),
    ]  # fmt: skip
    assert facts(refit.choose_draws(records)) == [
        ("Penal", "One", 1, 2, 10), ("Plain:group", "One", 0, 3, 0), ("Penal", "Two", 0, 5, 0),
    ]  # fmt: skip


def test_ties_go_to_the_first_step_trial_and_draw():
    tied = [record(0.5, trial_seed=t, hparams_seed=h, step=s) for t in (1, 0) for h in (3, 2) for s in (20, 10)]
    assert facts(refit.choose_draws(tied)) == [("Penal", "One", 0, 2, 10)]


def test_the_criterion_decides():
    one, other = record(0.6, hparams_seed=1), record(0.5, hparams_seed=2)
    for env in range(3):
        one |= {f"env{env}_out_g1_acc": 0.2, f"env{env}_out_g1_n": 1}  # AA .56, WGA .2
    assert facts(refit.choose_draws([one, other], "wga"))[0][3] == 2
    for env in range(3):
        one |= {f"env{env}_out_g0_acc": 0.9}  # AA .84, WGA .2
    assert facts(refit.choose_draws([one, other], "aa_wga"))[0][3] == 1


def test_the_chosen_run_again_with_explicit_hparams():
    chosen = record(
        0.9, step=7, drawn={"lr": 0.25}, hparams={"a": True}, hparams_seed=4, trial_seed=2, precision="bf16",
        ranges='{"lr": "U(0, 1)"}', confounders=["sex"], data_dir="/d", epochs=5, label="mine",
    )  # fmt: skip
    args_list = refit.refit_args_list(refit.choose_draws([chosen]), [42, 8])
    assert [args["seed"] for args in args_list] == [42, 8]
    assert args_list[0] == {
        "algorithm": "Penal", "dataset": "One", "test_envs": [0], "partition": "group", "label": "mine",
        "hparams": '{"a": true, "lr": 0.25, "weight": 1.0}', "hparams_seed": 0, "trial_seed": 2, "seed": 42,
        "holdout_fraction": 0.2, "precision": "bf16", "confounders": ["sex"], "data_dir": "/d", "epochs": 5,
    }  # fmt: skip
    assert {**args_list[0], "seed": 8} == args_list[1]


def test_hparams_that_the_algorithm_does_not_read_are_left_out():
    (args,) = refit.refit_args_list(refit.choose_draws([record(0.5, drawn={"unread": 3})]), [1])
    assert json.loads(args["hparams"]) == {"lr": 0.1, "weight": 1.0}


def test_changes_replace_the_runs_arguments():
    draws = refit.choose_draws([record(0.9, steps=100, checkpoint_freq=5)])
    [args] = refit.refit_args_list(draws, [1], {"epochs": 3, "checkpoint_freq": None, "skip_model_save": True})
    assert (args["epochs"], args["checkpoint_freq"], args["skip_model_save"]) == (3, 5, True)
    assert "steps" not in args
    [args] = refit.refit_args_list(draws, [1], {"steps": 7})
    assert args["steps"] == 7


def test_names_are_those_of_the_searchs_tables():
    variants = [
        {"hparams": {"x": 1}},
        {"hparams": {"x": 2}},
        {"partition": "random"},
        {"label": "L", "hparams": {"x": 3}},
    ]
    draws = refit.choose_draws([record(0.5, **variant) for variant in variants])
    assert sorted(draw.name for draw in draws) == ["L", "Penal x=1", "Penal x=2", "Penal:random"]


def test_what_tables_add_by_themselves_is_in_no_label():
    draws = refit.choose_draws([record(0.5, annotation_budget=budget) for budget in (0.1, 0.5)])
    args_list = refit.refit_args_list(draws, [1])
    assert [(args["label"], args["annotation_budget"]) for args in args_list] == [("Penal", 0.1), ("Penal", 0.5)]
    assert len(make_jobs(args_list, "o")) == 2


def test_a_validation_budget_stays_that_of_the_search():
    budgets = {"validation_budget": 0.25}
    [args] = refit.refit_args_list(refit.choose_draws([record(0.5, **budgets)]), [1])
    assert (args["label"], args["validation_budget"]) == ("Penal", 0.25)
    [job] = make_jobs([args], "o")
    assert "--validation_budget 0.25" in job.command_str


def test_a_control_gets_its_methods_draw():
    """Though another draw suits the control better."""
    records = [record(score, hparams_seed=seed, drawn={"lr": seed / 10}) for seed, score in ((1, 0.8), (2, 0.5))]
    records += [
        record(score, hparams_seed=seed, drawn={"lr": seed / 10}, hparams=OFF, label="Penal, control")
        for seed, score in ((1, 0.4), (2, 0.9))
    ]
    draws = refit.choose_draws(records)
    assert facts(draws) == [("Penal", "One", 0, 1, 0), ("Penal, control", "One", 0, 1, 0)]
    method, control = refit.refit_args_list(draws, [3])
    assert json.loads(method["hparams"]) == {"lr": 0.1, "weight": 1.0}
    assert json.loads(control["hparams"]) == {"lr": 0.1, "weight": 0.0}
    assert {key: value for key, value in method.items() if key not in ("hparams", "label")} == {
        key: value for key, value in control.items() if key not in ("hparams", "label")
    }
    assert refit.choose_draws(records, controls=True) == draws  # none is missing


def test_a_control_without_its_method_gets_its_own_draw():
    records = [record(0.4, hparams=OFF), record(0.9, hparams=OFF, hparams_seed=2), record(0.5, dataset="Two")]
    draws = refit.choose_draws(records)
    assert facts(draws) == [("Penal", "One", 0, 2, 0), ("Penal", "Two", 0, 0, 0)]
    assert draws[0].hparams["weight"] == 0.0


def test_a_control_of_several_methods_goes_by_its_label_then_to_the_plainest():
    methods = [record(0.5, hparams_seed=1), record(0.5, hparams_seed=2, hparams={"weight": 5.0}, label="five")]
    named = record(0.9, hparams_seed=3, hparams=OFF, label="five, control")
    nameless = record(0.9, hparams_seed=4, hparams=OFF)
    seeds = {d.name: d.choice.run.hparams_seed for d in refit.choose_draws([*methods, named])}
    assert seeds["five, control"] == 2
    seeds = {d.name: d.choice.run.hparams_seed for d in refit.choose_draws([*methods, nameless])}
    assert seeds["Penal weight=0.0"] == 1


def test_controls_that_were_not_searched():
    records = [record(0.5, hparams_seed=3), record(0.5, algorithm="Plain"), record(0.4, dataset="Two", label="L")]
    draws = refit.choose_draws(records, controls=True)
    assert [(d.name, d.choice.run.dataset, d.hparams["weight"]) for d in draws] == [
        ("Penal", "One", 1.0), ("Penal, control", "One", 0.0), ("Plain:group", "One", 1.0),
        ("L", "Two", 1.0), ("L, control", "Two", 0.0),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="none of Plain has one"):
        refit.choose_draws(records[1:2], controls=True)


def test_a_search_and_its_refit_agree_on_what_is_a_control():
    """The jobs that a sweep makes for a row and its control are recognised as such in their records."""
    launched = make_args_list(
        1, ["One"], ["Penal"], 1, 3, None, None, "domain_generalization", 0.2, True, None, controls=True
    )
    records = []
    for args in launched:
        given = json.loads(args.pop("hparams", "null"))
        records.append(record(0.5 + 0.1 * args["hparams_seed"] * (-1 if given else 1), hparams=given, **args))
    assert facts(refit.choose_draws(records)) == [("Penal", "One", 0, 2, 0), ("Penal, control", "One", 0, 2, 0)]


def test_only_what_is_wanted():
    records = [
        record(0.5, dataset=dataset, algorithm=algorithm, partition=partition)
        for dataset in ("One", "Two")
        for algorithm in ("Penal", "Plain")
        for partition in ("group", "environment")
    ]
    assert refit.wanted(records) == records
    assert len(refit.wanted(records, ["Two"])) == 4
    found = refit.wanted(records, rows=[SweepRow.parse("Penal"), SweepRow.parse("Plain:environment")])
    assert {(r["args"]["algorithm"], r["args"]["partition"]) for r in found} == {
        ("Penal", "group"),
        ("Plain", "environment"),
    }


def test_nothing_to_choose_by():
    with pytest.raises(ValueError, match="none of 1 records has what wga goes by"):
        refit.choose_draws([record(0.5, groups=False)], "wga")
    with pytest.raises(ValueError, match="criterion 'aa' is unknown"):
        refit.choose_draws([record(0.5)], "aa")


def test_a_draw_in_words():
    [draw] = refit.choose_draws([record(0.25, step=30, hparams_seed=4, trial_seed=1)])
    assert str(draw) == "Penal, One, test_envs [0]: 0.2500 (trial_seed 1, hparams_seed 4, step 30)"
