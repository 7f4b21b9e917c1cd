import json
from typing import Any

import pytest

from domainbed.budget_tables import Budget, budget_tables, chosen_by_budget, split_budget
from domainbed.rows import Row
from domainbed.table_formats import Table, render


def record(
    algorithm: str = "ERM", test: float = 0.5, validation: float | None = 0.5, step: int = 0, budget: float = 1.0,
    selection: float | None = None, dataset: str = "Cats", seed: int = 0, **args: Any,
) -> dict[str, Any]:  # fmt: skip
    """WGA on test (environment 0) and validation (environment 1), each of two groups; the other group has 1.

    Args:
        validation: None: no image of it is annotated.
        budget, selection: of training and of validation annotations; None: both alike.
    """
    budgets = {"annotation_budget": budget, "validation_budget": budget if selection is None else selection}
    run = {"algorithm": algorithm, "dataset": dataset, "test_envs": [0], "hparams_seed": 0, "seed": seed}
    found: dict[str, Any] = {"args": run | {"trial_seed": seed} | budgets | args, "hparams": {}, "step": step}
    for place, wga in (("env0_in", test), ("env1_out", validation)):
        found |= {f"{place}_acc": 0.5 if wga is None else (1 + wga) / 2, f"{place}_n": 8}
        if wga is not None:
            found |= {f"{place}_wga": wga, f"{place}_g0_acc": wga, f"{place}_g0_n": 4}
            found |= {f"{place}_g1_acc": 1.0, f"{place}_g1_n": 4}
    return found


def cells(table: Table) -> dict[str, dict[str, str]]:
    """The table's numbers by line and budget."""
    shown: list[list[str]] = [[getattr(cell, "text", cell) for cell in row] for row in table.rows]
    return {" ".join(row[:2]): dict(zip(table.header[2:], row[2:], strict=True)) for row in shown}


SWEEP = [
    *(record("RWG", wga, budget=b, seed=s) for b, s, wga in ((0, 0, 0.1), (0, 1, 0.3), (1, 0, 0.6), (1, 1, 0.8))),
    *(record("ERM", 0.2, budget=b) for b in (0.05, 1)),
]


def test_a_table_by_hand() -> None:
    (table,) = budget_tables(SWEEP)
    assert (
        table.title == "Cats: worst-group accuracy by annotation budget, model selection: (AA + WGA) / 2 on validation"
    )
    assert cells(table) == {
        "ERM Uniform Env.": {"0 %": "X", "5 %": "20.0 (n=1)", "100 %": "20.0 (n=1)"},
        "RWG Uniform Group": {"0 %": "20.0 ± 14.1", "5 %": "X", "100 %": "70.0 ± 14.1"},
    }
    text = render([table], "text")
    assert "RWG        Uniform Group  20.0 ± 14.1  X           70.0 ± 14.1" in text
    assert "budget=" not in text
    assert "Runs are chosen by what is granted alone." in text


def test_training_and_validation_may_differ() -> None:
    pairs = [(1.0, 1.0), (0.05, 1.0), (1.0, 0.05), (0.05, 0.05), (1.0, 0.0)]
    records = [record(test=i / 10, budget=b, selection=v) for i, (b, v) in enumerate(pairs)]
    (table,) = budget_tables(records)
    assert table.header[2:] == ["5 %", "100 %", "5 / 100 %", "100 / 0 %", "100 / 5 %"]
    assert list(cells(table)["ERM Uniform Env."].values()) == ["30.0", "0.0", "10.0", "40.0", "20.0"]


@pytest.mark.parametrize(
    ("budget", "title"),
    [((0.05, 0.05), "5 %"), ((0.005, 1), "0.5 / 100 %"), ((0.07, 0.07), "7 %"), ((0, 0), "0 %"), ((1, 0), "100 / 0 %")],
)
def test_titles_of_budgets(budget: tuple[float, float], title: str) -> None:
    assert Budget(*budget).title == title


def test_each_dataset_has_its_table_and_its_budgets() -> None:
    more = [record("RWG", 0.4, budget=b, dataset="Dogs", hparams='{"lr": 1}') for b in (0.2, 1)]
    single = [record("RWG", 0.4, budget=1, dataset="Birds")]
    tables = budget_tables([*SWEEP, *more, *single])
    assert [table.title.partition(":")[0] for table in tables] == ["Cats", "Dogs"]
    assert cells(tables[1]) == {"RWG Uniform Group": {"20 %": "40.0", "100 %": "40.0"}}


def test_one_budget_or_no_groups_make_no_table() -> None:
    plain = [{k: v for k, v in r.items() if "_wga" not in k and "_g" not in k} for r in SWEEP]
    assert budget_tables([r for r in SWEEP if r["args"]["annotation_budget"] == 1]) == []
    assert budget_tables(plain) == []
    assert budget_tables([]) == []


def test_the_budget_s_own_validation_chooses() -> None:
    """Without annotations by the average, which is best at step 0; with them by AA and WGA, best at step 1."""
    blind = [record(test=wga, validation=None, budget=0, step=i) | {"env1_out_acc": 0.9 - i / 10}
             for i, wga in enumerate((0.2, 0.7))]  # fmt: skip
    seeing = [record(test=wga, validation=v, step=i) for i, (wga, v) in enumerate(((0.2, 0.4), (0.7, 0.6)))]
    (table,) = budget_tables([*blind, *seeing])
    assert cells(table) == {"ERM Uniform Env.": {"0 %": "20.0", "100 %": "70.0"}}


def test_rows_that_differ_in_more_than_the_budget_are_lines_of_their_own() -> None:
    inferred = [record("RWG", 0.5, budget=0, confounders=[f"inferred:{name}"]) for name in ("george", "errors")]
    labelled = [record("RWG", 0.9, budget=b, label="mine", partition="random") for b in (0, 1)]
    (table,) = budget_tables([*SWEEP, *inferred, *labelled])
    found = cells(table)
    assert found['RWG confounders=["inferred:george"] Uniform Group'] == {"0 %": "50.0 (n=1)", "5 %": "X", "100 %": "X"}
    assert found["mine Random"] == {"0 %": "90.0 (n=1)", "5 %": "X", "100 %": "90.0 (n=1)"}
    assert [name.partition(" ")[0] for name in found] == ["ERM", "RWG", "RWG", "RWG", "mine"]


def test_a_row_and_its_budget() -> None:
    args = {"algorithm": "RWG", "annotation_budget": 0.05, "hparams": json.dumps({"lr": 1})}
    row, budget = split_budget(Row.of(args))
    assert (row, budget) == (Row("RWG", "group", None, (("lr", "1"),)), Budget(0.05, 1))
    assert split_budget(row) == (row, Budget(1, 1))


def test_the_best_draw_of_each_trial() -> None:
    draws = [record(test=wga, validation=v, hparams_seed=h) for h, (wga, v) in enumerate(((0.2, 0.9), (0.8, 0.1)))]
    (trials,) = chosen_by_budget(draws).trials.values()
    assert [choice.test.wga for choice in trials] == [0.2]
