import numpy as np
import pytest
from scipy import stats

from domainbed.rank_tables import rank_tables, ranked, verdict
from domainbed.ranks import Ranks
from domainbed.table_formats import render


def record(algorithm="ERM", dataset="DigitsM2M", step=0, test=(0.5, 0.5), val=(0.5, 0.5), values=(), **args):
    """AA and WGA on test and validation in two equal groups, 0 and 1."""
    metrics = {}
    for split, (aa, wga) in {"env1_in": test, "env0_out": val}.items():
        metrics |= {f"{split}_acc": aa, f"{split}_wga": wga, f"{split}_g0_acc": wga, f"{split}_g1_acc": 2 * aa - wga}
        metrics |= {f"{split}_g0_n": 4, f"{split}_g1_n": 4}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": [1], "trial_seed": 0, "hparams_seed": 0, "seed": 0}
    return {"args": run | args, "step": step, **metrics, **dict(values)}


DATASETS = ("DigitsM2M", "DigitsO2O", "ColoredDigits", "Cats", "Dogs", "Birds")
SCORES = {"ERM": [0.1, 0.2, 0.1, 0.2, 0.1, 0.2], "IRM": [0.2, 0.2, 0.3, 0.3, 0.3, 0.3], "MMD": [0.4] * 6}


def sweep(datasets=DATASETS):
    return [
        record(name, dataset, trial_seed=trial, test=(0.5, wga + gain))
        for name, scores in SCORES.items()
        for dataset, wga in zip(datasets, scores, strict=False)
        for trial, gain in enumerate((-0.05, 0.05))
    ]


def test_ranks_of_the_means_over_seeds():
    names, ranks = ranked(sweep())
    assert names == ["ERM", "IRM", "MMD"]
    assert ranks.mean == pytest.approx([17.5 / 6, 12.5 / 6, 1])  # one tie of ERM and IRM
    assert ranks.friedman_p == pytest.approx(stats.friedmanchisquare(*SCORES.values()).pvalue)
    assert ranks.critical_difference == pytest.approx(2.343 * np.sqrt(3 * 4 / (6 * 6)), abs=1e-3)


def test_text_by_hand():
    (table,) = rank_tables(sweep())
    assert table.title.startswith("Average ranks over 6 datasets by WGA, model selection: (AA + WGA) / 2")
    assert [[row[0], row[1].text] for row in table.rows] == [["MMD", "1.00"], ["IRM", "2.08"], ["ERM", "2.92"]]
    assert table.after == ["The rows differ. Friedman: p = 0.003; Nemenyi's critical difference at 0.05: 1.35."]


def test_datasets_that_some_row_lacks_are_left_out():
    (table,) = rank_tables([*sweep(DATASETS[:2]), record("ERM", "Cats")])
    assert "Datasets: DigitsO2O, DigitsM2M." in table.notes
    assert "Left out, as some row has no WGA there: Cats." in table.notes
    assert table.after[0].startswith(
        "Too few datasets (2; at least 5) to tell rows apart by their ranks. Friedman: p = "
    )


def test_nothing_to_rank():
    apart = [record("ERM", "Cats"), record("IRM", "Dogs")]
    for records in ([], apart, [record()]):
        names, ranks = ranked(records)
        assert (names, ranks.n, rank_tables(records)) == ([], 0, [])


def test_one_dataset_has_ranks_but_no_test():
    text = render(rank_tables(sweep(DATASETS[:1])), "text")
    assert "over 1 dataset by" in text
    assert text.endswith("Too few datasets (1; at least 5) to tell rows apart by their ranks.\n")


@pytest.mark.parametrize("n", [1, 2, 6])
def test_rows_that_tie_on_every_dataset(n):
    alike = [record(name, dataset) for name in ("ERM", "IRM") for dataset in DATASETS[:n]]
    (table,) = rank_tables(alike)
    assert table.after == ["No row ever differs."]


def test_datasets_with_nan_are_left_out():
    nan = record("IRM", "Cats", trial_seed=2, test=(0.5, float("nan")))
    (table,) = rank_tables([*sweep(), nan])
    assert table.title.startswith("Average ranks over 5 datasets")
    assert "Left out, as some row has no WGA there: Cats." in table.notes
    rows = [r for r in sweep() if r["args"]["dataset"] != "Cats"]
    assert ranked([*sweep(), nan]) == ranked(rows)


def test_no_significant_difference():
    test = "Friedman: p = 0.400; Nemenyi's critical difference at 0.05: 0.60."
    assert verdict(Ranks([1.4, 1.6], 0.4, 0.6, 10)) == f"No significant difference between the rows. {test}"
    assert "p < 0.001" in verdict(Ranks([1, 2], 0.0001, 0.6, 10))
