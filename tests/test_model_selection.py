import itertools
import logging
import math
import re

import numpy as np
import pytest

from domainbed import model_selection, registry, scores
from domainbed import records as keys
from domainbed.lib.query import Q
from domainbed.lib.reporting import get_grouped_records
from domainbed.model_selection import (
    IIDAccuracySelectionMethod,
    IIDAutoLRAccuracySelectionMethod,
    LeaveOneOutSelectionMethod,
    OracleSelectionMethod,
    SelectionMethod,
    choose,
    choose_by_accuracy,
    get_test_records,
    with_several_test_envs,
)

NAN = float("nan")


@pytest.fixture
def official(monkeypatch):
    """The dataset Official is trained on environment 0, validated on 1 and 2, tested on 3 and 4."""
    facts = {("Official", "VALIDATION_ENVS"): (1, 2), ("Official", "TEST_ENVS"): (3, 4)}
    monkeypatch.setattr(
        registry, "attribute", lambda _, name, attribute, default=None: facts.get((name, attribute), default)
    )


def record(
    step=0, test_envs=(0,), dataset="Debug28", trial_seed=0, hparams_seed=0, seed=None, algorithm="ERM", **values
):
    """A checkpoint; unless told otherwise the seed is another one for each draw, as in a sweep."""
    seed = 1000 - hparams_seed if seed is None else seed
    seeds = {"trial_seed": trial_seed, "hparams_seed": hparams_seed, "seed": seed}
    return {
        "args": {"algorithm": algorithm, "dataset": dataset, "test_envs": list(test_envs), **seeds},
        "step": step,
    } | values


def accuracies(ins, outs):
    return {f"env{i}_in_acc": acc for i, acc in enumerate(ins)} | {f"env{i}_out_acc": acc for i, acc in enumerate(outs)}


def sweep(seed, n_envs=3, n_hparams=3, steps=(0, 10, 20)):
    """All records of one trial with few different accuracies, so that there are many ties."""
    rng = np.random.default_rng(seed)
    test_envs = [envs for n in (1, 2) for envs in itertools.combinations(range(n_envs), n)]
    return [
        record(step, envs, hparams_seed=draw, **accuracies(*rng.integers(0, 5, (2, n_envs)) / 4))
        for envs in test_envs
        for draw in range(n_hparams)
        for step in steps
    ]


def by_definition(records, test_env, n_envs, judge):
    """The test accuracy of the best draw, where judge(draw) is (val, test) or None; ties go to the larger draw."""
    best = None
    for draw in sorted({r["args"]["hparams_seed"] for r in records}):
        judged = judge([r for r in records if r["args"]["hparams_seed"] == draw], test_env, n_envs)
        if judged is not None and (best is None or judged[0] >= best[0]):
            best = judged
    return best and best[1]


def iid(run, test_env, n_envs):
    best = None
    for r in run:
        if r["args"]["test_envs"] == [test_env]:
            others = [r[f"env{e}_out_acc"] for e in range(n_envs) if e != test_env]
            val = sum(others) / len(others)
            if best is None or val > best[0]:
                best = val, r[f"env{test_env}_in_acc"]
    return best


def oracle(run, test_env, n_envs):
    last = max((r for r in run if r["args"]["test_envs"] == [test_env]), key=lambda r: r["step"])
    return last[f"env{test_env}_out_acc"], last[f"env{test_env}_in_acc"]


def leave_one_out(run, test_env, n_envs):
    best = None
    for step in sorted({r["step"] for r in run}):
        at = {tuple(r["args"]["test_envs"]): r for r in run if r["step"] == step}
        vals = []
        for e in range(n_envs):
            if e != test_env:
                pair = at.get(tuple(sorted((e, test_env))))
                vals.append(None if pair is None else pair[f"env{e}_in_acc"])
        if (test_env,) in at and None not in vals:
            val = sum(vals) / len(vals)
            if best is None or val > best[0]:
                best = val, at[test_env,][f"env{test_env}_in_acc"]
    return best


class TestDomainBedsMethods:
    @pytest.mark.parametrize(
        ("method", "judge"),
        [
            (IIDAccuracySelectionMethod, iid),
            (OracleSelectionMethod, oracle),
            (LeaveOneOutSelectionMethod, leave_one_out),
        ],
    )
    @pytest.mark.parametrize("seed", range(8))
    def test_agrees_with_its_definition(self, method, judge, seed):
        n_envs = 3 + seed % 2
        records = sweep(seed, n_envs)
        groups = get_grouped_records(Q(records))
        expected = [by_definition(records, test_env, n_envs, judge) for test_env in range(n_envs)]
        assert [method.sweep_acc(group["records"]) for group in groups] == expected
        assert None not in expected

    def test_names(self):
        methods = IIDAccuracySelectionMethod, LeaveOneOutSelectionMethod, OracleSelectionMethod
        assert [method.name for method in (*methods, IIDAutoLRAccuracySelectionMethod)] == [
            "training-domain validation set",
            "leave-one-domain-out cross-validation",
            "test-domain validation set (oracle)",
            "auto lr training-domain validation set",
        ]

    def test_methods_are_never_instantiated(self):
        with pytest.raises(TypeError, match="use the class itself"):
            OracleSelectionMethod()
        with pytest.raises(NotImplementedError):
            SelectionMethod.run_acc(Q([]))

    def test_draws_are_ranked_with_ties_to_the_larger_seed_and_nan_last(self):
        vals = {0: 0.5, 1: NAN, 2: 0.5, 3: 0.7}
        records = [record(hparams_seed=draw, **accuracies([0.1 * draw] * 2, [0, val])) for draw, val in vals.items()]
        ranked = IIDAccuracySelectionMethod.hparams_accs(Q(records))
        assert [run[0]["args"]["hparams_seed"] for _, run in ranked] == [3, 2, 0, 1]
        assert ranked[0][0] == {"val_acc": 0.7, "test_acc": pytest.approx(0.3)}
        assert IIDAccuracySelectionMethod.sweep_acc(Q(records)) == pytest.approx(0.3)

    def test_nan_never_wins_within_a_run(self):
        records = Q([record(step, **accuracies([step / 10, 0], [0, val])) for step, val in enumerate([NAN, 0.2, NAN])])
        assert IIDAccuracySelectionMethod.run_acc(records) == {"val_acc": 0.2, "test_acc": 0.1}

    def test_several_test_environments_serve_leave_one_out_only(self):
        single, pair = record(test_envs=[1]), record(test_envs=[0, 1])
        assert get_test_records(Q([single, pair])) == [single]
        for method in (IIDAccuracySelectionMethod, OracleSelectionMethod, LeaveOneOutSelectionMethod):
            assert method.sweep_acc(Q([record(test_envs=[0, 1], **accuracies([1, 1, 1], [1, 1, 1]))])) is None

    def test_leave_one_out_needs_every_other_environment_left_out(self):
        records = [r for r in sweep(0) if r["args"]["test_envs"] != [0, 2]]
        groups = get_grouped_records(Q(records))
        found = [LeaveOneOutSelectionMethod.sweep_acc(group["records"]) is not None for group in groups]
        assert found == [False, True, False]

    @pytest.mark.parametrize("method", [IIDAccuracySelectionMethod, OracleSelectionMethod])
    def test_a_run_without_its_test_environment_is_left_out_with_a_warning(self, method, caplog):
        lacking = record(test_envs=[5], **accuracies([0.5] * 3, [0.5] * 3))
        with caplog.at_level(logging.WARNING):
            assert method.sweep_acc(Q([lacking])) is None
        assert "ERM, Debug28, test_envs [5]" in caplog.text
        whole = record(test_envs=[5], hparams_seed=1, **accuracies([0.5] * 6, [0.25] * 6))
        assert method.sweep_acc(Q([lacking, whole])) == 0.5

    def test_leave_one_out_passes_over_missing_environments(self):
        records = [record(test_envs=envs, env0_out_acc=1, env1_out_acc=1) for envs in ([0], [0, 1])]
        assert LeaveOneOutSelectionMethod.sweep_acc(Q(records)) is None
        records[1]["env1_in_acc"] = 0.5
        assert LeaveOneOutSelectionMethod.sweep_acc(Q(records)) is None
        records[0]["env0_in_acc"] = 0.25
        assert LeaveOneOutSelectionMethod.sweep_acc(Q(records)) == 0.25

    def test_auto_lr_reports_the_second_stage(self):
        stage = accuracies([0.1, 0.1], [0.1, 0.1])
        assert IIDAutoLRAccuracySelectionMethod.sweep_acc(Q([record(**stage, fd_env0_in_acc=0.9)])) == 0.9
        assert IIDAccuracySelectionMethod.sweep_acc(Q([record(**stage, fd_env0_in_acc=0.9)])) == 0.1


@pytest.mark.usefixtures("official")
class TestOfficialSplits:
    def test_validation_environments_choose(self):
        steps = [(0.9, 0.1, 0.2, 0.6), (0.1, 0.5, 0.4, 0.7), (0.9, 0.5, 0.3, 0.8)]
        run = Q([record(i, [3], "Official", **accuracies(ins, [])) for i, ins in enumerate(steps)])
        assert IIDAccuracySelectionMethod.run_acc(run) == {"val_acc": pytest.approx(0.45), "test_acc": 0.7}

    @pytest.mark.parametrize("method", [OracleSelectionMethod, LeaveOneOutSelectionMethod])
    def test_the_other_methods_have_nothing_to_say(self, method, caplog):
        assert method.sweep_acc(Q([record(0, [3], "Official", **accuracies([1] * 4, []))])) is None
        assert not caplog.records


class TestSeveralTestEnvs:
    def envs(self, *records):
        return [tuple(r["args"]["test_envs"]) for r in with_several_test_envs(records)]

    def test_pairs_beside_single_ones_serve_leave_one_out_only(self):
        leave_one_out = [record(test_envs=envs) for envs in ([0], [1], [0, 1], [0, 2])]
        assert self.envs(*leave_one_out) == []
        assert self.envs(*leave_one_out[2:]) == [(0, 1), (0, 2)]
        assert self.envs(*leave_one_out[:1], record(test_envs=[1, 2])) == []

    def test_pairs_of_another_row_or_dataset_stay(self):
        single = record(test_envs=[0])
        others = [record(test_envs=[0, 1], algorithm="IRM"), record(test_envs=[1, 2], dataset="VLCS")]
        assert self.envs(single, *others) == [(0, 1), (1, 2)]
        labelled = record(test_envs=[0, 1])
        labelled["args"]["label"] = "mine"
        assert self.envs(single, labelled) == [(0, 1)]

    def test_three_are_never_a_pair(self):
        assert self.envs(record(test_envs=[0]), record(test_envs=[0, 1]), record(test_envs=[2, 0, 1])) == [(2, 0, 1)]

    @pytest.mark.parametrize("seed", range(6))
    def test_agrees_with_its_definition(self, seed):
        rng = np.random.default_rng(seed)
        test_envs, trained = ([1, 2, 3], [0]) if seed % 2 else ([0, 2], [1, 3])
        records = [
            record(step, test_envs, dataset="VLCS", hparams_seed=draw, **accuracies(*rng.integers(0, 5, (2, 4)) / 4))
            for draw in (1, 0, 2)
            for step in (20, 0, 10)
        ]
        best = None
        for r in sorted(records, key=lambda r: (r["args"]["hparams_seed"], r["step"])):
            val = sum(r[f"env{e}_out_acc"] for e in trained) / len(trained)
            if best is None or val > best[0]:
                best = val, r
        (choice,) = choose_by_accuracy(records)
        assert (choice.score, choice.record) == (pytest.approx(best[0]), best[1])
        assert choice.test == {e: best[1][f"env{e}_in_acc"] for e in test_envs}
        assert choice.mean == pytest.approx(sum(choice.test.values()) / len(test_envs))

    def test_of_one_test_environment_is_domainbeds_method(self):
        rng = np.random.default_rng(7)
        records = [record(step, [1], **accuracies(*rng.random((2, 3)))) for step in range(20)]
        (choice,) = choose_by_accuracy(records)
        assert IIDAccuracySelectionMethod.run_acc(Q(records)) == {"val_acc": choice.score, "test_acc": choice.test[1]}

    def test_test_environments_do_not_choose(self):
        first = record(0, [0, 1], **accuracies([0.1, 0.2, 0], [0.9, 0.9, 0.5]))
        second = record(1, [0, 1], **accuracies([0.3, 0.4, 0], [0, 0, 0.6]))
        (choice,) = choose_by_accuracy([first, second])
        assert (choice.step, choice.test, choice.mean) == (1, {0: 0.3, 1: 0.4}, pytest.approx(0.35))

    def test_trials_rows_and_test_environments_are_separate(self):
        places = [{}, {"trial_seed": 1}, {"algorithm": "IRM"}, {"test_envs": [0, 1]}, {"seed": 1}]
        places = [{"test_envs": [0, 2], "seed": 0} | place for place in places]
        found = choose_by_accuracy([record(**p, **accuracies([0.5] * 3, [0.5] * 3)) for p in places])
        assert len(found) == 5
        assert [c.replicate for c in found if c.run[:-1] == found[0].run[:-1]] == [0, 1]

    def test_incomplete_checkpoints_are_left_out_with_a_warning_and_nan_never_wins(self, caplog):
        whole = record(2, [0, 1], **accuracies([0.5] * 3, [0, 0, 0.2]))
        better = record(1, [0, 1], **accuracies([0.5], [0, 0, 0.9]))
        nan = record(0, [0, 1], **accuracies([0.5] * 3, [0, 0, NAN]))
        with caplog.at_level(logging.WARNING):
            assert [choice.step for choice in choose_by_accuracy([nan, better, whole])] == [2]
        assert "left out some checkpoints of a run (ERM" in caplog.text
        assert choose_by_accuracy([nan]) == []
        unheld = record(0, [0, 1], **accuracies([0.5] * 3, []))
        assert choose_by_accuracy([unheld]) == []

    def test_auto_lr_reports_the_second_stage(self):
        stage = accuracies([0.1] * 3, [0.1] * 3) | {"fd_env0_in_acc": 0.9, "fd_env2_in_acc": 0.7}
        (choice,) = choose_by_accuracy([record(test_envs=[0, 2], **stage)], IIDAutoLRAccuracySelectionMethod)
        assert choice.test == {0: 0.9, 2: 0.7}

    @pytest.mark.usefixtures("official")
    def test_official_validation_environments_choose(self):
        steps = [(0.9, 0.1, 0.2, 0.6, 0.5), (0.1, 0.5, 0.4, 0.7, 0.3), (0.9, 0.5, 0.3, 0.8, 0.8)]
        (choice,) = choose_by_accuracy(
            [record(i, [3, 4], "Official", **accuracies(ins, [])) for i, ins in enumerate(steps)]
        )
        assert (choice.step, choice.score, choice.test) == (1, pytest.approx(0.45), {3: 0.7, 4: 0.3})


def split(rng, env, kind, n=30, n_groups=3):
    """(per-image correctness, groups) of a split, and its record keys computed image by image."""
    groups = rng.choice(n_groups, n, p=[0.7, 0.2, 0.1])
    correct = rng.random(n) < 0.5 + 0.1 * groups
    values = {f"env{env}_{kind}_acc": correct.mean()}
    for g in set(groups.tolist()):
        values[f"env{env}_{kind}_g{g}_acc"] = correct[groups == g].mean()
        values[f"env{env}_{kind}_g{g}_n"] = int((groups == g).sum())
    values[f"env{env}_{kind}_wga"] = min(correct[groups == g].mean() for g in groups)
    return (correct, groups), values


def aa_and_wga(*splits):
    """Of the concatenated images."""
    correct, groups = (np.concatenate(parts) for parts in zip(*splits, strict=True))
    return correct.mean(), min(correct[groups == g].mean() for g in groups)


def grouped_record(aa, wga, test=(0.5, 0.5), **place):
    """A record whose validation (env 1, out) and test (env 0, in) have the given AA and WGA in two equal groups."""
    values = {}
    for name, (average, worst) in {"env1_out": (aa, wga), "env0_in": test}.items():
        values |= {f"{name}_acc": average, f"{name}_wga": worst, f"{name}_g0_n": 10, f"{name}_g1_n": 10}
        values |= {f"{name}_g0_acc": worst, f"{name}_g1_acc": 2 * average - worst}
    return record(**place, **values)


class TestPooled:
    @pytest.mark.parametrize("seed", range(5))
    def test_is_what_the_pooled_images_give(self, seed):
        rng = np.random.default_rng(seed)
        places = [(0, "out"), (2, "out"), (11, "in")]
        parts = [split(rng, *place) for place in places]
        values = {key: value for _, some in parts for key, value in some.items()}
        for n in (1, 2, 3):
            expected = aa_and_wga(*(images for images, _ in parts[:n]))
            assert keys.pooled(values, places[:n]) == pytest.approx(expected)

    def test_too_many_groups_to_be_written(self):
        values = {}
        for env, (acc, wga) in enumerate([(0.9, 0.2), (0.5, 0.4)]):
            values |= {
                f"env{env}_out_acc": acc,
                f"env{env}_out_wga": wga,
                f"env{env}_out_wga_g": 70,
                f"env{env}_out_wga_n": 3,
            }
        assert keys.pooled(values, [(0, "out"), (1, "out")]) == pytest.approx((0.7, 0.2))

    def test_nothing_to_pool(self):
        assert keys.pooled({"env0_in_acc": 1.0}, [(0, "in")]) is None
        assert keys.pooled({"env0_in_acc": 1.0, "env0_in_wga": 1.0}, [(0, "in"), (1, "in")]) is None
        assert keys.pooled({"env0_in_acc": 1.0, "env0_in_wga": 1.0}, []) is None

    def test_finds_the_environments_of_a_record(self):
        values = {"env10_in_acc": 1, "env2_in_acc": 1, "env2_out_acc": 1, "env3_in_g0_acc": 1, "fd_env4_in_acc": 1}
        assert keys.environments(values, "in") == [2, 10]
        assert keys.environments(values, "out") == [2]
        assert not keys.has_groups(values)
        assert keys.has_groups({"env0_in_wga": 1})


def budget_record(aa, wga=None, **place):
    """As ``grouped_record``, of a validation budget that grants 20 of 40 validation images; without WGA none."""
    values = grouped_record(0.5 if wga is None else aa, 0.5 if wga is None else wga, **place)
    values |= {"env1_out_acc": aa, "env1_out_n": 40}
    if wga is None:
        values = {key: n for key, n in values.items() if not re.match(r"env1_out_(g\d|wga)", key)}
    values["args"]["validation_budget"] = 0.0 if wga is None else 0.5
    return values


class TestValidationBudget:
    @pytest.mark.parametrize("criterion", model_selection.CRITERIA)
    def test_without_annotations_the_average_chooses(self, criterion):
        steps = {4: 0.5, 2: 0.75, 3: 0.75, 1: NAN}
        (choice,) = choose([budget_record(aa, step=step) for step, aa in steps.items()], criterion)
        assert (choice.step, choice.score, choice.validation) == (2, 0.75, (0.75, None))  # the earliest of ties
        assert choice.test == (0.5, 0.5)
        assert choose([budget_record(NAN)], criterion) == []

    def test_the_groups_that_are_granted_choose(self):
        records = [budget_record(0.9, 0.1, step=1), budget_record(0.8, 0.6, step=2), budget_record(0.95, NAN, step=3)]
        (choice,) = choose(records)
        assert (choice.step, choice.validation) == (2, (0.8, 0.6))
        assert choice.score == pytest.approx(0.7)
        (by_wga,) = choose(records, "wga")
        assert by_wga.score == 0.6

    def test_the_average_is_of_all_images(self):
        """In the pooled groups AA is .5: what is granted does not stand for the rest."""
        values = budget_record(0.5, 0.25) | {"env2_out_acc": 1.0, "env2_out_n": 120}
        (choice,) = choose([values])
        assert choice.validation == (pytest.approx(7 / 8), 0.25)

    def test_the_oracle_sees_all_test_confounders_whatever_the_budget(self):
        records = [
            budget_record(0.9, step=1),
            budget_record(0.1, step=2) | {"env0_in_g0_acc": 1.0, "env0_in_g1_acc": 1},
        ]
        (choice,) = model_selection.choose_oracle(records)
        assert (choice.step, choice.score) == (2, 1)

    def test_domainbeds_own_method_takes_no_notice(self):
        steps = [(0.6, 0.6), (0.7, 0.1), (0.5, 0.5)]
        records = [budget_record(*accs, step=i) | {"env0_out_acc": 0.0} for i, accs in enumerate(steps)]
        assert IIDAccuracySelectionMethod.run_acc(Q(records))["val_acc"] == 0.7


class TestChoose:
    def test_the_criterion_is_an_argument(self):
        first = grouped_record(0.95, 0.3, hparams_seed=0)  # (AA + WGA) / 2 = .625
        second = grouped_record(0.6, 0.5, hparams_seed=1)  # .55
        for criterion, best, score in (("aa_wga", first, 0.625), ("wga", second, 0.5)):
            (choice,) = choose([first, second], criterion)
            assert choice.record is best
            assert choice.score == pytest.approx(score)
        with pytest.raises(ValueError, match=r"'accuracy' is unknown; choose among aa_wga, wga"):
            choose([first], "accuracy")

    def test_validation_pools_the_training_environments_and_test_the_tested_ones(self):
        rng = np.random.default_rng(0)
        images, values = {}, {}
        for env, kind in itertools.product(range(4), ("in", "out")):
            images[env, kind], some = split(rng, env, kind)
            values |= some
        (choice,) = choose([record(7, [3, 1], **values)])
        assert choice.validation == pytest.approx(aa_and_wga(images[0, "out"], images[2, "out"]))
        assert choice.test == pytest.approx(aa_and_wga(images[1, "in"], images[3, "in"]))
        assert choice.score == pytest.approx(sum(choice.validation) / 2)
        assert (choice.step, choice.run.test_envs) == (7, (1, 3))

    def test_test_means_are_those_of_the_tested_environments_together(self):
        measured = {"env0_in": {0: (0.5, 1), 1: (0.25, 3)}, "env2_in": {0: (1.0, 1), 1: (0.25, 1)}}
        values = dict(grouped_record(0.5, 0.5)) | {"train_g0_n": 1, "train_g1_n": 3}
        for name, groups in measured.items():
            values |= {f"{name}_wga": 0.25, f"{name}_acc": 0.5, f"{name}_group_mean_acc": 0.5}
            for g, (acc, n) in groups.items():
                values |= {f"{name}_g{g}_acc": acc, f"{name}_g{g}_n": n}
        values["args"] = record(test_envs=[0, 2])["args"]
        (choice,) = choose([values])
        assert choice.test_means == (0.25 * 0.75 + 0.75 * 0.25, 0.5)
        (old,) = choose([grouped_record(0.5, 0.5)])
        assert old.test_means == (None, None)

    @pytest.mark.usefixtures("official")
    def test_official_splits_are_pooled_likewise(self):
        rng = np.random.default_rng(1)
        images, values = {}, {}
        for env in range(5):
            images[env], some = split(rng, env, "in")
            values |= some
        (choice,) = choose([record(0, [3, 4], "Official", **values)])
        assert choice.validation == pytest.approx(aa_and_wga(images[1], images[2]))
        assert choice.test == pytest.approx(aa_and_wga(images[3], images[4]))

    def test_ties_go_to_the_earliest_step_and_the_smallest_hparams_seed(self):
        places = [(9, 1), (2, 1), (1, 2), (5, 1), (3, 1)]
        records = [grouped_record(0.8, 0.4, step=step, hparams_seed=draw) for step, draw in places]
        (choice,) = choose(records)
        assert (choice.run.hparams_seed, choice.step) == (1, 2)

    def test_trials_rows_datasets_and_test_environments_are_separate(self):
        places = [
            {}, {"trial_seed": 1}, {"algorithm": "IRM"}, {"dataset": "Debug224"},
        ]  # fmt: skip
        records = [grouped_record(0.9, 0.4, hparams_seed=draw, **place) for place in places for draw in range(2)]
        found = {(c.run.trial_seed, c.run.row.algorithm, c.run.dataset, c.run.hparams_seed) for c in choose(records)}
        assert found == {
            (0, "ERM", "Debug28", 0),
            (1, "ERM", "Debug28", 0),
            (0, "IRM", "Debug28", 0),
            (0, "ERM", "Debug224", 0),
        }

    def test_seeds_of_one_draw_do_not_compete(self):
        scores = {42: 0.5, 8: 0.9, 777: 0.7}
        records = [grouped_record(0.9, wga, seed=seed, step=step) for seed, wga in scores.items() for step in (1, 2)]
        found = {choice.run.seed: (choice.replicate, choice.validation.wga, choice.step) for choice in choose(records)}
        assert found == {8: (0, 0.9, 1), 42: (1, 0.5, 1), 777: (2, 0.7, 1)}

    def test_nan_never_wins(self):
        records = [grouped_record(NAN, 0.9, step=0), grouped_record(0.5, NAN, step=1), grouped_record(0.3, 0.1, step=2)]
        for criterion in model_selection.CRITERIA:
            assert [choice.step for choice in choose(records, criterion)] == [2]
            assert choose(records[:2], criterion) == []

    def test_runs_without_groups_are_passed_over_silently_and_incomplete_ones_with_a_warning(self, caplog):
        assert choose([record(**accuracies([1, 1], [1, 1]))]) == []
        assert not caplog.records
        incomplete = {k: v for k, v in grouped_record(0.5, 0.5).items() if not k.startswith("env0_in")}
        with caplog.at_level(logging.WARNING):
            assert choose([incomplete]) == []
        assert "left out some checkpoints of a run (ERM" in caplog.text


def test_the_score_is_the_papers():
    assert scores.aa_wga(0.8, 0.4) == pytest.approx(0.6)
    assert math.isnan(scores.aa_wga(NAN, 0.4))
