import numpy as np
import pytest

from domainbed import registry, tables
from domainbed.console import print_row
from domainbed.model_selection import (
    IIDAccuracySelectionMethod,
    LeaveOneOutSelectionMethod,
    OracleSelectionMethod,
)

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


def test_escape_covers_latexs_special_characters():
    assert tables.escape(r"+90%_a&b#c$d{e}") == r"+90\%\_a\&b\#c\$d\{e\}"
    assert tables.escape("\\ ~ ^ ± <") == r"\textbackslash{} \~{} \^{} $\pm$ $<$"


def test_columns_of_domainbeds_datasets_need_no_class():
    assert tables.columns("VLCS", []) == {0: "C", 1: "L", 2: "S", 3: "V"}


def test_domainbeds_datasets_keep_all_columns_where_a_class_names_test_environments():
    record = {"args": {"algorithm": "ERM", "dataset": "SpawriousM2M_hard", "test_envs": [0]}}
    assert list(tables.columns("SpawriousM2M_hard", [record])) == [0, 1, 2]
