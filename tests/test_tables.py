import re

import numpy as np
import pytest

from domainbed import registry, tables
from domainbed.console import print_row
from domainbed.model_selection import (
    IIDAccuracySelectionMethod,
    LeaveOneOutSelectionMethod,
    OracleSelectionMethod,
)
from domainbed.rows import for_domainbed

METHODS = (IIDAccuracySelectionMethod, LeaveOneOutSelectionMethod, OracleSelectionMethod)


def record(dataset, test_envs, step=0, trial_seed=0, hparams_seed=0, algorithm="ERM", seed=0, args=(), **values):
    seeds = {"trial_seed": trial_seed, "hparams_seed": hparams_seed, "seed": seed}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": list(test_envs), **seeds, **dict(args)}
    return {"args": run, "step": step} | values


def accuracies(ins, outs):
    return {f"env{i}_in_acc": acc for i, acc in enumerate(ins)} | {f"env{i}_out_acc": acc for i, acc in enumerate(outs)}


# Worked out by hand. ERM on env 0, trial 0: validation prefers draw 0 at step 1 (.7 against .6 and .65), the oracle
# draw 1 (.8 against .3); trial 1 has one run. So 100 * mean and 100 * sd / sqrt(2) of (.2, .3) and of (.9, .3); the
# averages are over trials of the mean over environments: (1.4 / 3, .3) and (.7, .3).
SMALL = [
    record("ColoredMNIST", [0], 0, **accuracies([0.1, 0, 0], [0.9, 0.5, 0.7])),
    record("ColoredMNIST", [0], 1, **accuracies([0.2, 0, 0], [0.3, 0.6, 0.8])),
    record("ColoredMNIST", [0], 1, hparams_seed=1, **accuracies([0.9, 0, 0], [0.8, 0.65, 0.65])),
    record("ColoredMNIST", [0], 0, trial_seed=1, **accuracies([0.3, 0, 0], [0.4, 0.5, 0.5])),
    record("ColoredMNIST", [1], 0, **accuracies([0, 0.4, 0], [0.5, 0.5, 0.5])),
    record("ColoredMNIST", [2], 0, **accuracies([0, 0, 0.8], [0.5, 0.5, 0.5])),
    record("ColoredMNIST", [0], 0, algorithm="IRM", **accuracies([0.55, 0, 0], [0.5, 0.5, 0.5])),
]
SMALL_TEXT = [
    "Total records: 7",
    "",
    "-------- Dataset: ColoredMNIST, model selection method: training-domain validation set",
    "Algorithm             +90%                  +80%                  -90%                  Avg                  ",
    "ERM                   25.0 +/- 3.5          40.0 +/- 0.0          80.0 +/- 0.0          48.3                 ",
    "IRM                   55.0 +/- 0.0          X                     X                     X                    ",
    "",
    "-------- Averages, model selection method: training-domain validation set",
    "Algorithm                  ColoredMNIST               Avg                       ",
    "ERM                        38.3 +/- 5.9               38.3                      ",
    "IRM                        55.0 +/- 0.0               55.0                      ",
    "",
    "-------- Dataset: ColoredMNIST, model selection method: leave-one-domain-out cross-validation",
    "Algorithm             +90%                  +80%                  -90%                  Avg                  ",
    "ERM                   X                     X                     X                     X                    ",
    "IRM                   X                     X                     X                     X                    ",
    "",
    "-------- Averages, model selection method: leave-one-domain-out cross-validation",
    "Algorithm                  ColoredMNIST               Avg                       ",
    "ERM                        X                          X                         ",
    "IRM                        X                          X                         ",
    "",
    "-------- Dataset: ColoredMNIST, model selection method: test-domain validation set (oracle)",
    "Algorithm             +90%                  +80%                  -90%                  Avg                  ",
    "ERM                   60.0 +/- 21.2         40.0 +/- 0.0          80.0 +/- 0.0          60.0                 ",
    "IRM                   55.0 +/- 0.0          X                     X                     X                    ",
    "",
    "-------- Averages, model selection method: test-domain validation set (oracle)",
    "Algorithm                  ColoredMNIST               Avg                       ",
    "ERM                        50.0 +/- 14.1              50.0                      ",
    "IRM                        55.0 +/- 0.0               55.0                      ",
    "",
]

# An algorithm and a dataset that nobody knows stand last, in order of appearance; names longer than 20 are cut.
FOREIGN = [
    record("Cats_and_dogs", [1], algorithm="AnAlgorithmFromAnotherPaper", **accuracies([0, 0.125], [0.5, 0.5])),
    record("Cats_and_dogs", [0], algorithm="AnAlgorithmFromAnotherPaper", **accuracies([0.5, 0], [0.5, 0.5])),
    record("Cats_and_dogs", [1], **accuracies([0, 1], [0.5, 0.5])),
    record("Debug28", [2], **accuracies([0, 0, 0.25], [0.5, 0.5, 0.5])),
]
FOREIGN_TEXT = [
    "",
    "-------- Dataset: Debug28, model selection method: training-domain validation set",
    "Algorithm             0                     1                     2                     Avg                  ",
    "ERM                   X                     X                     25.0 +/- 0.0          X                    ",
    "AnAlgorithmFromAnoth  X                     X                     X                     X                    ",
    "",
    "-------- Dataset: Cats_and_dogs, model selection method: training-domain validation set",
    "Algorithm             env0                  env1                  Avg                  ",
    "ERM                   X                     100.0 +/- 0.0         X                    ",
    "AnAlgorithmFromAnoth  50.0 +/- 0.0          12.5 +/- 0.0          31.2                 ",
    "",
    "-------- Averages, model selection method: training-domain validation set",
    "Algorithm                  Debug28                    Cats_and_dogs              Avg                       ",
    "ERM                        25.0 +/- 0.0               100.0 +/- 0.0              62.5                      ",
    "AnAlgorithmFromAnotherPap  X                          31.2 +/- 0.0               X                         ",
    "",
]

FOREIGN_LATEX = [
    r"\documentclass{article}",
    r"\usepackage{booktabs}",
    r"\usepackage{adjustbox}",
    r"\begin{document}",
    r"\section{Full DomainBed results}",
    r"% Total records: 2",
    r"",
    r"\subsection{Model selection: training-domain validation set}",
    r"",
    r"\subsubsection{Cats\_and\_dogs}",
    r"",
    r"\begin{center}",
    r"\adjustbox{max width=\textwidth}{%",
    r"\begin{tabular}{lccc}",
    r"\toprule",
    r"\textbf{Algorithm}   & \textbf{env0}        & \textbf{env1}        & \textbf{Avg}         \\",
    r"\midrule",
    r"AnAlgorithmFromAnotherPaper & 50.0 $\pm$ 0.0       & 12.5 $\pm$ 0.0       & 31.2                 \\",
    r"\bottomrule",
    r"\end{tabular}}",
    r"\end{center}",
    r"",
    r"\subsubsection{Averages}",
    r"",
    r"\begin{center}",
    r"\adjustbox{max width=\textwidth}{%",
    r"\begin{tabular}{lcc}",
    r"\toprule",
    r"\textbf{Algorithm}        & \textbf{Cats\_and\_dogs}  & \textbf{Avg}              \\",
    r"\midrule",
    r"AnAlgorithmFromAnotherPaper & 31.2 $\pm$ 0.0            & 31.2                      \\",
    r"\bottomrule",
    r"\end{tabular}}",
    r"\end{center}",
    r"\end{document}",
    r"",
]


class TestDomainBedsTables:
    def test_text_by_hand(self):
        assert tables.domainbed_tables(SMALL, METHODS, latex=False).split("\n") == SMALL_TEXT

    def test_what_nobody_knows_by_hand(self):
        assert tables.results_tables(FOREIGN, IIDAccuracySelectionMethod, latex=False).split("\n") == FOREIGN_TEXT

    def test_latex_by_hand(self):
        text = tables.domainbed_tables(FOREIGN[:2], METHODS[:1], latex=True)
        assert text.split("\n") == FOREIGN_LATEX

    def test_lines_are_those_of_print_row(self, capsys):
        cells = ["short", "a cell of many characters", "X"]
        for row in cells, cells[::-1]:
            print_row(row, colwidth=10)
        text = tables.table_text([cells[1:], cells[1::-1]], "", [cells[0], cells[2]], cells, 10, latex=False)
        header, first, second = text.split("\n")[2:5]
        assert capsys.readouterr().out.split("\n")[:2] == [header, second]
        assert first == header

    def test_a_table_given_by_the_caller_stays_as_it_was(self):
        table, labels, columns = [["1"]], ["a"], ["", "b"]
        tables.table_text(table, "title", labels, columns)
        assert (table, labels, columns) == ([["1"]], ["a"], ["", "b"])

    def test_format_mean(self):
        values = [0.1, 0.4, 0.25]
        mean, error, cell = tables.format_mean(values, latex=False)
        assert mean == pytest.approx(100 * sum(values) / 3)
        assert error == pytest.approx(100 * np.sqrt(sum((v - 0.25) ** 2 for v in values) / 3) / np.sqrt(3))
        assert cell == "25.0 +/- 7.1"
        assert tables.format_mean(iter(values), latex=True)[2] == r"25.0 $\pm$ 7.1"
        assert tables.format_mean([], latex=False) == (None, None, "X")

    def test_rows_that_differ_are_never_averaged_together(self):
        runs = [((), 0.2), ([("partition", "random")], 0.4), ([("hparams", '{"lr": 1}')], 0.6)]
        records = [record("Debug28", [0], args=args, **accuracies([acc, 0], [0, 0])) for args, acc in runs]
        lines = tables.results_tables(records, IIDAccuracySelectionMethod, latex=False).split("\n")
        cells = [line.split("  ")[0] + " " + line[22:26] for line in lines[3:6]]
        assert cells == ["ERM 20.0", "ERM lr=1 60.0", "ERM:random 40.0"]

    def test_a_draw_trained_again_with_other_seeds_counts_each_seed(self):
        records = [record("Debug28", [0], seed=s, **accuracies([acc, 0], [0, acc])) for s, acc in enumerate([0.2, 0.6])]
        assert "40.0 +/- 14.1" in tables.results_tables(records, IIDAccuracySelectionMethod, latex=False)


class TestColumns:
    def facts(self, monkeypatch, **facts):
        monkeypatch.setattr(
            registry, "attribute", lambda _, name, attribute, default=None: facts.get(attribute, default)
        )

    def test_all_environments_without_test_envs(self):
        assert tables.columns("ColoredMNIST", []) == {0: "+90%", 1: "+80%", 2: "-90%"}

    def test_test_envs_and_what_else_was_tested_on(self, monkeypatch):
        self.facts(monkeypatch, ENVIRONMENTS=("a", "b", "c", "d"), TEST_ENVS=(2,))
        assert tables.columns("Ours", []) == {2: "c"}
        records = [record("Ours", [0, 2]), record("Other", [3]), record("Ours", [7])]
        assert tables.columns("Ours", records) == {2: "c", 0: "a", 7: "env7"}

    def test_a_dataset_without_a_class_shows_what_its_records_know(self):
        records = [record("Cats", [0], **accuracies([1], [1, 1, 1])), record("Cats", [3], **accuracies([1], [1]))]
        assert tables.columns("Cats", records) == {0: "env0", 1: "env1", 2: "env2", 3: "env3"}


def test_names_come_in_domainbeds_order_then_ours_then_as_they_appear():
    order = tables.in_order("algorithms", ["Zeta", "EX2L_MAE", "IRM", "Alpha", "URM", "ERM", "Zeta"])
    assert order == ["ERM", "IRM", "URM", "EX2L_MAE", "Zeta", "Alpha"]


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
    "Algorithm  Sampling      C            L           S            Mean",
    "ERM        Uniform Env.  80.0 ± 10.0  60.0 ± 0.0  40.0 ± 10.0  60.0 ± 0.0",
    "IRM        Random        95.0 (n=1)   65.0 (n=1)  50.0 (n=1)   70.0 (n=1)",
    "MMD        Uniform Env.  X            X           X            X",
    "",
    "-------- PACS, trained on A, P, tested on C, S: accuracy, model selection: training-domain validation set",
    "Percent; one seed; (n=...) where fewer; X: none. Rows with unfinished runs are counted as they are.",
    "Algorithm  Sampling      C     S     Mean",
    "ERM        Uniform Env.  25.0  75.0  50.0",
    "",
]


class TestSeveralTestEnvs:
    def test_text_by_hand(self):
        assert tables.several_test_envs_tables(SEVERAL).split("\n") == SEVERAL_TEXT

    def test_nothing_where_pairs_serve_leave_one_out(self):
        assert tables.several_test_envs_tables(SEVERAL[-2:]) == ""
        assert tables.several_test_envs_tables(SEVERAL[-2:], latex=True) == ""

    def test_a_dataset_without_a_class_and_a_budget(self):
        values = accuracies([0.5, 0.25, 0], [1, 1, 1])
        text = tables.several_test_envs_tables(
            [record("Cats", [1, 0], args=[("annotation_budget", 0.5)], **values)],
        )
        assert "-------- Cats, trained on env2, tested on env0, env1: accuracy" in text
        assert "\nbudget: the share" in text
        assert re.search(r"^ERM budget=0.5 +Uniform Env. +50.0 +25.0 +37.5$", text, re.M)

    def test_official_validation_environments_are_not_trained_on(self, monkeypatch):
        facts = {"ENVIRONMENTS": ("a", "b", "c", "d"), "VALIDATION_ENVS": (1,), "TEST_ENVS": (2, 3)}
        monkeypatch.setattr(
            registry, "attribute", lambda _, name, attribute, default=None: facts.get(attribute, default)
        )
        text = tables.several_test_envs_tables([record("Ours", [2, 3], **accuracies([1, 1, 0.5, 0.25], []))])
        assert "Ours, trained on a, tested on c, d:" in text
        assert text.split("\n")[-2].split() == ["ERM", "Uniform", "Env.", "50.0", "25.0", "37.5"]

    def test_latex_is_a_whole_document(self):
        text = tables.several_test_envs_tables(SEVERAL, latex=True)
        assert text.startswith("\\documentclass{article}\n")
        assert text.endswith("\\end{document}\n")
        assert "validation set. Percent; mean $\\pm$ sample sd" in text
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}}") == 2
        assert r"80.0 $\pm$ 10.0" in text
        assert text.isascii()


class TestGroupTables:
    def test_text_by_hand(self):
        first, second = tables.group_tables(GROUPED).split("\n\n")
        assert first.split("\n") == GROUPED_TEXT[:-1]
        expected = "\n".join(GROUPED_TEXT[1:]).replace("(AA + WGA) / 2", "WGA")
        assert second == expected

    def test_a_dataset_tested_on_several_environments_has_a_pair_of_columns_for_each(self):
        one = record("ColoredMNIST", [2], **groups((0.5, 0.25), env=2))
        both = record("ColoredMNIST", [2, 1], **groups((0.75, 0.5), env=1), **groups((0.25, 0.25), env=2))
        both |= groups((0.5, 0.5), env=2)  # env 0 validates, 1 and 2 are pooled
        header, line = (re.split(r"  +", row) for row in tables.group_tables([one, both]).split("\n")[3:5])
        assert header[2:] == [f"ColoredMNIST[{envs}] {m}" for envs in ("1,2", "2") for m in ("AA", "WGA")]
        assert line == ["ERM", "Uniform Env.", "62.5", "50.0", "50.0", "25.0"]

    def test_adjusted_average_and_group_mean_by_hand(self):
        assert tables.group_tables(ADJUSTED).split("\n\n")[0].split("\n") == ADJUSTED_TEXT

    def test_a_group_mean_alone_needs_no_word_on_adjusting(self):
        text = tables.group_tables(ADJUSTED[-1:])
        assert "Cats AA  Cats group mean  Cats WGA" in text
        assert "adjusted" not in text

    def test_a_budget_that_all_rows_share_is_stated(self):
        records = [
            record("ColoredMNIST", [2], algorithm=name, args=[("annotation_budget", 0.05)], **groups((0.5, 0.25)))
            for name in ("ERM", "GroupDRO")
        ]
        _, title, _, note, *lines = tables.group_tables(records).split("\n\n")[0].split("\n")
        assert "WGA" in title
        assert note == (
            "budget: the share of the training images whose confounder labels were kept; 1 where none is stated. "
            "Validation keeps all."
        )
        assert [line.split("  ")[0] for line in lines[1:]] == ["ERM budget=0.05", "GroupDRO budget=0.05"]
        (first, *_), algorithms = for_domainbed(records)
        assert first["args"]["algorithm"] == "ERM budget=0.05"
        assert set(algorithms) == {"ERM budget=0.05", "GroupDRO budget=0.05"}
        assert "budget" not in tables.group_tables(GROUPED)

    def test_one_seed_has_no_spread(self):
        text = tables.group_tables(GROUPED[:1])
        assert "Percent; one seed;" in text
        assert text.split("\n")[4].split() == ["ERM", "Uniform", "Env.", "50.0", "10.0"]

    def test_nothing_without_groups(self):
        assert tables.group_tables(GROUPED[-1:]) == ""
        assert tables.group_tables(GROUPED[-1:], latex=True) == ""

    def test_latex_is_a_whole_document_with_balanced_braces(self):
        text = tables.group_tables(GROUPED, latex=True)
        assert text.startswith("\\documentclass{article}\n")
        assert text.endswith("\\end{document}\n")
        assert text.isascii()
        assert r"Another\_algorithm policy=none" in text
        assert r"60.0 $\pm$ 10.0" in text
        bare = re.sub(r"\\[{}]", "", text)
        assert bare.count("{") == bare.count("}")
        assert text.count(r"\begin{tabular}{lccccc}") == text.count(r"\end{tabular}}") == 2


def test_escape_covers_latexs_special_characters():
    assert tables.escape(r"+90%_a&b#c$d{e}") == r"+90\%\_a\&b\#c\$d\{e\}"
    assert tables.escape("\\ ~ ^ ±") == r"\textbackslash{} \~{} \^{} $\pm$"


def test_columns_of_domainbeds_datasets_need_no_class():
    assert tables.columns("VLCS", []) == {0: "C", 1: "L", 2: "S", 3: "V"}
