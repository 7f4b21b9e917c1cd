import re

import pytest

from domainbed import group_tables, registry
from domainbed.rows import Run, for_domainbed
from domainbed.table_formats import render


def group_text(records, format="text"):
    return render(group_tables.group_tables(records), format)


def several_text(records):
    return render(group_tables.several_test_envs_tables(records), "text")


def record(dataset, test_envs, step=0, trial_seed=0, hparams_seed=0, algorithm="ERM", seed=0, args=(), **values):
    seeds = {"trial_seed": trial_seed, "hparams_seed": hparams_seed, "seed": seed}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": list(test_envs), **seeds, **dict(args)}
    return {"args": run, "step": step} | values


def accuracies(ins, outs):
    return {f"env{i}_in_acc": acc for i, acc in enumerate(ins)} | {f"env{i}_out_acc": acc for i, acc in enumerate(outs)}


def groups(test, validation=(0.5, 0.5), env=2):
    """AA and WGA on test (env, in) and on validation (another environment, out) in two equal groups."""
    values = {}
    for name, (aa, wga) in {f"env{env}_in": test, f"env{(env + 1) % 3}_out": validation}.items():
        values |= {f"{name}_acc": aa, f"{name}_wga": wga, f"{name}_g0_acc": wga, f"{name}_g1_acc": 2 * aa - wga}
        values |= {f"{name}_g0_n": 5, f"{name}_g1_n": 5}
    return values


# By hand: ERM by environment has three trials, AA .5 .6 .7 and WGA .1 .1 .4 (sd sqrt(.03) = .1732); by group two.
GROUPED = [
    record("ColoredMNIST", [2], **groups((0.5, 0.1), (0.9, 0.8))),
    record("ColoredMNIST", [2], 1, **groups((0.9, 0.9), (0.8, 0.8))),  # never best on validation
    record("ColoredMNIST", [2], trial_seed=1, **groups((0.6, 0.1))),
    record("ColoredMNIST", [2], trial_seed=2, **groups((0.7, 0.4))),
    record("ColoredMNIST", [2], args=[("partition", "group")], **groups((0.8, 0.5))),
    record("ColoredMNIST", [2], trial_seed=1, args=[("partition", "group")], **groups((0.8, 0.7))),
    record(
        "Cats", [0], algorithm="Another_algorithm", args=[("hparams", '{"policy": "none"}')], **groups((1, 1), env=0)
    ),
    record("Cats", [0], algorithm="Another_algorithm", **groups((0.75, 0.25), env=0)),
    record("VLCS", [0], **accuracies([1] * 4, [1] * 4)),
]
GROUPED_TEXT = [
    "",
    "-------- Average (AA) and worst-group (WGA) accuracy, model selection: (AA + WGA) / 2 on validation",
    "Percent; mean ± sample sd (ddof 1) over 3 seeds; (n=...) where fewer; X: none."
    " Rows with unfinished runs are counted as they are.",
    "Protocol: one draw of the hparams, trial_seed 0, 1, 2 (fixed or refit).",
    "Algorithm                      Sampling       ColoredMNIST AA   ColoredMNIST WGA   Cats AA      Cats WGA",
    "ERM                            Uniform Env.   60.0 ± 10.0       20.0 ± 17.3        X            X",
    "ERM                            Uniform Group  80.0 ± 0.0 (n=2)  60.0 ± 14.1 (n=2)  X            X",
    "Another_algorithm              Uniform Env.   X                 X                  75.0 (n=1)   25.0 (n=1)",
    "Another_algorithm policy=none  Uniform Env.   X                 X                  100.0 (n=1)  100.0 (n=1)",
    "",
]


# By hand: two seeds on ColoredMNIST, adjusted AA of the second not to be had; on Cats training shows none of the test
# groups; on Debug28 the record is from before these numbers were kept.
ADJUSTED = [
    record("ColoredMNIST", [2], **groups((0.5, 0.1)), env2_in_adj_acc=0.25, env2_in_group_mean_acc=0.5),
    record("ColoredMNIST", [2], trial_seed=1, **groups((0.7, 0.1)), env2_in_group_mean_acc=0.7),
    record("Debug28", [0], **groups((0.75, 0.25), env=0)),
    record("Cats", [0], **groups((0.75, 0.25), env=0), env0_in_group_mean_acc=0.625),
]
ADJUSTED_TEXT = [
    "",
    "-------- Average (AA) and worst-group (WGA) accuracy, model selection: (AA + WGA) / 2 on validation",
    "Percent; mean ± sample sd (ddof 1) over 2 seeds; (n=...) where fewer; X: none."
    " Rows with unfinished runs are counted as they are.",
    "Protocol: one draw of the hparams, trial_seed 0, 1 (fixed or refit).",
    "adjusted AA: groups weighted by their shares of each run's training images.",
    "group mean: non-empty groups weighted equally.",
    "Algorithm  Sampling      Debug28 AA  Debug28 WGA  ColoredMNIST AA  ColoredMNIST adjusted AA"
    "  ColoredMNIST group mean  ColoredMNIST WGA  Cats AA     Cats group mean  Cats WGA",
    "ERM        Uniform Env.  75.0 (n=1)  25.0 (n=1)   60.0 ± 14.1      25.0 (n=1)              "
    "  60.0 ± 14.1              10.0 ± 0.0        75.0 (n=1)  62.5 (n=1)       25.0 (n=1)",
]


def from_v(ins, val, **place):
    """VLCS, trained on V and tested on C, L and S."""
    return record("VLCS", [0, 1, 2], **accuracies([*ins, 1], [1, 1, 1, val]), **place)


# By hand. ERM, three trials: C 90 80 70 (sd 10), L 60, S 30 40 50 (sd 10), means 60 60 60; a checkpoint that is better
# on test but worse on validation is not taken. IRM has one trial, MMD none that can be judged.
SEVERAL = [
    from_v([0.9, 0.6, 0.3], 0.8),
    from_v([1, 1, 1], 0.7, step=1),
    from_v([0.8, 0.6, 0.4], 0.8, trial_seed=1),
    from_v([0.7, 0.6, 0.5], 0.8, trial_seed=2),
    from_v([0.95, 0.65, 0.5], 0.8, algorithm="IRM", args=[("partition", "random")]),
    from_v([0.95, 0.65, 0.5], float("nan"), algorithm="MMD"),
    record("PACS", [1, 3], **accuracies([0, 0.25, 0, 0.75], [1, 0, 0.5, 0])),
    *(record("Debug28", envs, **accuracies([1] * 3, [1] * 3)) for envs in ([0], [0, 1])),  # serves leave-one-out
]
SEVERAL_TEXT = [
    "",
    "-------- VLCS, trained on V, tested on C, L, S: accuracy, model selection: training-domain validation set",
    "Percent; mean ± sample sd (ddof 1) over 3 seeds; (n=...) where fewer; X: none."
    " Rows with unfinished runs are counted as they are.",
    "Protocol: one draw of the hparams, trial_seed 0, 1, 2 (fixed or refit).",
    "Algorithm  Sampling      C            L           S            Mean",
    "ERM        Uniform Env.  80.0 ± 10.0  60.0 ± 0.0  40.0 ± 10.0  60.0 ± 0.0",
    "IRM        Random        95.0 (n=1)   65.0 (n=1)  50.0 (n=1)   70.0 (n=1)",
    "MMD        Uniform Env.  X            X           X            X",
    "",
    "-------- PACS, trained on A, P, tested on C, S: accuracy, model selection: training-domain validation set",
    "Percent; one seed; (n=...) where fewer; X: none. Rows with unfinished runs are counted as they are.",
    "Protocol: one draw of the hparams, seed 0 (fixed or refit).",
    "Algorithm  Sampling      C     S     Mean",
    "ERM        Uniform Env.  25.0  75.0  50.0",
    "",
]


class TestSeveralTestEnvs:
    def test_text_by_hand(self):
        assert several_text(SEVERAL).split("\n") == SEVERAL_TEXT

    def test_nothing_where_pairs_serve_leave_one_out(self):
        assert group_tables.several_test_envs_tables(SEVERAL[-2:]) == []

    def test_a_dataset_without_a_class_and_a_budget(self):
        values = accuracies([0.5, 0.25, 0], [1, 1, 1])
        text = several_text([record("Cats", [1, 0], args=[("annotation_budget", 0.5)], **values)])
        assert "-------- Cats, trained on env2, tested on env0, env1: accuracy" in text
        assert "\nbudget: the share" in text
        assert re.search(r"^ERM budget=0.5 +Uniform Env. +50.0 +25.0 +37.5$", text, re.M)

    def test_official_validation_environments_are_not_trained_on(self, monkeypatch):
        facts = {"ENVIRONMENTS": ("a", "b", "c", "d"), "VALIDATION_ENVS": (1,), "TEST_ENVS": (2, 3)}
        monkeypatch.setattr(
            registry, "attribute", lambda _, name, attribute, default=None: facts.get(attribute, default)
        )
        text = several_text([record("Ours", [2, 3], **accuracies([1, 1, 0.5, 0.25], []))])
        assert "Ours, trained on a, tested on c, d:" in text
        assert text.split("\n")[-2].split() == ["ERM", "Uniform", "Env.", "50.0", "25.0", "37.5"]


class TestGroupTables:
    def test_text_by_hand(self):
        first, second = group_text(GROUPED).split("\n\n")
        assert first.split("\n") == GROUPED_TEXT[:-1]
        expected = "\n".join(GROUPED_TEXT[1:]).replace("(AA + WGA) / 2", "WGA")
        assert second == expected

    def test_a_dataset_tested_on_several_environments_has_a_pair_of_columns_for_each(self):
        one = record("ColoredMNIST", [2], **groups((0.5, 0.25), env=2))
        both = record("ColoredMNIST", [2, 1], **groups((0.75, 0.5), env=1), **groups((0.25, 0.25), env=2))
        both |= groups((0.5, 0.5), env=2)  # env 0 validates, 1 and 2 are pooled
        header, line = (re.split(r"  +", row) for row in group_text([one, both]).split("\n")[4:6])
        assert header[2:] == [f"ColoredMNIST[{envs}] {m}" for envs in ("1,2", "2") for m in ("AA", "WGA")]
        assert line == ["ERM", "Uniform Env.", "62.5", "50.0", "50.0", "25.0"]

    def test_adjusted_average_and_group_mean_by_hand(self):
        assert group_text(ADJUSTED).split("\n\n")[0].split("\n") == ADJUSTED_TEXT

    def test_a_group_mean_alone_needs_no_word_on_adjusting(self):
        text = group_text(ADJUSTED[-1:])
        assert "Cats AA  Cats group mean  Cats WGA" in text
        assert "adjusted" not in text

    def test_a_budget_that_all_rows_share_is_stated(self):
        records = [
            record("ColoredMNIST", [2], algorithm=name, args=[("annotation_budget", 0.05)], **groups((0.5, 0.25)))
            for name in ("ERM", "GroupDRO")
        ]
        _, title, _, _, note, *lines = group_text(records).split("\n\n")[0].split("\n")
        assert "WGA" in title
        assert note == (
            "budget: the share of the training images whose confounder labels were kept; 1 where none is stated. "
            "Validation keeps all."
        )
        assert [line.split("  ")[0] for line in lines[1:]] == ["ERM budget=0.05", "GroupDRO budget=0.05"]
        (first, *_), algorithms = for_domainbed(records)
        assert first["args"]["algorithm"] == "ERM budget=0.05"
        assert set(algorithms) == {"ERM budget=0.05", "GroupDRO budget=0.05"}
        assert "budget" not in group_text(GROUPED)

    def test_a_validation_budget_is_stated_and_explained(self):
        hidden = groups((0.5, 0.25)) | {"env0_out_acc": 0.75, "env0_out_n": 40}
        hidden = {key: n for key, n in hidden.items() if not re.match(r"env0_out_(g\d|wga)", key)}
        records = [
            record("ColoredMNIST", [2], args=[("validation_budget", 0.0)], **hidden),
            record("ColoredMNIST", [2], algorithm="GroupDRO", args=[("validation_budget", 0.5)], **groups((0.75, 0.5))),
        ]
        _, _, _, _, note, _, *lines = group_text(records).split("\n\n")[0].split("\n")
        assert note == group_tables.VALIDATION_NOTE
        assert "by AA alone" in note
        cells = {tuple(re.split("  +", line.strip())) for line in lines}
        assert cells == {
            ("ERM val_budget=0.0", "Uniform Env.", "50.0", "25.0"),
            ("GroupDRO val_budget=0.5", "Uniform Env.", "75.0", "50.0"),
        }
        both = record("ColoredMNIST", [2], args=[("annotation_budget", 0.5), ("validation_budget", 0.0)], **hidden)
        assert group_tables.budget_notes([Run.of(both["args"]).row]) == [
            group_tables.BUDGET_NOTE,
            group_tables.VALIDATION_NOTE,
        ]

    def test_one_seed_has_no_spread(self):
        text = group_text(GROUPED[:1])
        assert "Percent; one seed;" in text
        assert text.split("\n")[5].split() == ["ERM", "Uniform", "Env.", "50.0", "10.0"]

    def test_nothing_without_groups(self):
        assert group_tables.group_tables(GROUPED[-1:]) == []

    def test_the_numbers_behind_a_cell(self):
        (table, _) = group_tables.group_tables(GROUPED)
        aa, wga = table.rows[0][2:4]
        assert aa.values == pytest.approx(
            {"mean": 0.6, "sd": 0.1, "n": 3, "low": 0.6 - 0.2484138, "high": 0.6 + 0.2484138}
        )
        assert (aa.interval, wga.interval) == ("[35.2, 84.8]", "[-23.0, 63.0]")  # t of 2 df is 4.3027
        assert table.rows[0][4] == "X"
        single = table.rows[2][4]
        assert (single.values["n"], single.values["sd"], single.values["low"], single.interval) == (1, None, None, "")


class TestProtocol:
    def notes(self, *args):
        run = {"algorithm": "ERM", "dataset": "Cats", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
        return group_tables.protocol_notes(Run.of(run | some) for some in args)

    def test_one_draw_with_the_papers_seeds(self):
        refit = [{"seed": seed} for seed in (42, 8, 777)]
        assert self.notes(*refit) == ["Protocol: one draw of the hparams, seed 8, 42, 777 (fixed or refit)."]

    def test_many_seeds_are_counted(self):
        runs = [{"seed": seed} for seed in range(6)]
        assert self.notes(*runs) == ["Protocol: one draw of the hparams, 6 seeds (fixed or refit)."]

    def test_a_search(self):
        runs = [{"hparams_seed": draw, "trial_seed": trial} for trial in (0, 1) for draw in range(3 + trial)]
        assert self.notes(*runs) == ["Protocol: the best of 3 to 4 draws of the hparams per trial (search)."]

    def test_both(self):
        runs = [*({"hparams_seed": draw} for draw in range(20)), {"algorithm": "IRM"}]
        expected = "Protocol: the best of 20 draws of the hparams per trial (search); for other lines "
        assert self.notes(*runs) == [
            f"{expected}one draw of the hparams, seed 0 (fixed, refit, or a search that is not finished)."
        ]

    def test_a_running_search_is_one_line_though_a_trial_has_a_single_draw_yet(self):
        runs = [{"hparams_seed": draw, "trial_seed": trial} for trial, n in enumerate((5, 5, 1)) for draw in range(n)]
        assert self.notes(*runs) == ["Protocol: the best of 1 to 5 draws of the hparams per trial (search)."]

    def test_each_line_is_told_by_what_its_own_runs_differ_in(self):
        refit = [{"seed": seed} for seed in (42, 8, 777)]
        trials = [{"algorithm": "IRM", "trial_seed": trial, "seed": 99 * trial} for trial in range(3)]
        alone = {"algorithm": "MMD", "trial_seed": 1, "seed": 123456}
        listed = "one draw of the hparams, trial_seed 0, 1, 2 or seed 8, 42, 777 (fixed or refit)"
        assert self.notes(*refit, *trials) == [f"Protocol: {listed}."]
        assert self.notes(*refit, *trials, alone) == [f"Protocol: {listed}."]

    def test_a_line_searched_on_one_dataset_and_fixed_on_another(self):
        runs = [*({"hparams_seed": draw} for draw in range(3)), {"dataset": "Dogs", "seed": 7}]
        expected = "Protocol: the best of 3 draws of the hparams per trial (search); for other lines "
        assert self.notes(*runs) == [
            f"{expected}one draw of the hparams, seed 7 (fixed, refit, or a search that is not finished)."
        ]

    def test_none(self):
        assert self.notes() == []
