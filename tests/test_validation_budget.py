"""What those who read a run's records make of a validation budget, from its flags to the API and the report's pages."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from domainbed import api as db
from domainbed import jobs, selection_tables
from domainbed.datasets import get_dataset_class
from domainbed.report.curves import curves
from domainbed.scripts import sweep_arguments, train_arguments
from domainbed.scripts.train_execution import validation_score
from domainbed.table_formats import render
from domainbed.training import EarlyStopping

OUT = [(1, "out"), (2, "out")]


def record(aa: float, wga: float | None, step: int = 0, second: float | None = None) -> dict[str, Any]:
    """A checkpoint of a run whose test environment 0 has AA .5 and WGA .25.

    Args:
        aa, wga: of the 30 validation images of environment 1, of which 4 are annotated; without WGA none is.
        second: AA of the 10 images of environment 2, of which none is annotated.
    """
    budget = 0.0 if wga is None else 0.1
    args = {"algorithm": "ERM", "dataset": "ColoredMNIST", "test_envs": [0], "validation_budget": budget}
    args |= {"trial_seed": 0, "hparams_seed": 0, "seed": 0}
    values: dict[str, Any] = {"env0_in_acc": 0.5, "env0_in_wga": 0.25, "env0_in_g0_acc": 0.25, "env0_in_g0_n": 5}
    values |= {"env0_in_g1_acc": 0.75, "env0_in_g1_n": 5, "env1_out_acc": aa, "env1_out_n": 30}
    values |= {"env2_out_acc": aa if second is None else second, "env2_out_n": 10}
    if wga is not None:
        values |= {"env1_out_wga": wga, "env1_out_g0_acc": wga, "env1_out_g0_n": 2}
        values |= {"env1_out_g1_acc": 1.0, "env1_out_g1_n": 2}
    return {"args": args, "hparams": {}, "step": step, **values}


def write(directory: Path, found: list[dict[str, Any]]) -> None:
    directory.mkdir()
    (directory / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    (directory / "done").write_text("done")


def test_the_score_of_a_run_under_way() -> None:
    splits: Any = [SimpleNamespace(number=env, kind=kind) for env, kind in OUT]
    assert validation_score(record(0.8, 0.5, second=0.4), splits) == pytest.approx((0.7 + 0.5) / 2)
    assert validation_score(record(0.8, None, second=0.4), splits) == pytest.approx(0.7)
    assert math.isnan(validation_score(record(math.nan, None), splits))
    assert math.isnan(validation_score({"env1_out_acc": 0.5, "env2_out_acc": 0.5}, splits))
    assert math.isnan(validation_score({}, splits))
    assert math.isnan(validation_score(record(0.8, 0.5), []))


def test_training_is_stopped_early_by_the_average_where_nothing_is_annotated() -> None:
    splits: Any = [SimpleNamespace(number=env, kind=kind) for env, kind in OUT]
    stopping = EarlyStopping(patience=2)
    over = [
        stopping.is_over(validation_score(record(aa, None), splits), i) for i, aa in enumerate((0.5, 0.9, 0.9, 0.8))
    ]
    assert over == [False, False, False, True]
    assert stopping.best_step == 1


@pytest.mark.parametrize("criterion", ["aa_wga", "wga"])
def test_the_api_leaves_what_is_not_granted_blank(tmp_path: Path, criterion: str) -> None:
    write(tmp_path / "a", [record(0.6, None, 0), record(0.8, None, 1, second=0.4), record(0.7, None, 2)])
    line = db.load_runs(tmp_path).iloc[1]
    assert (line["validation_aa"], line["test_aa"], line["test_wga"]) == (pytest.approx(0.7), 0.5, 0.25)
    assert line["validation_wga"] is None or math.isnan(line["validation_wga"])
    (chosen,) = db.select(tmp_path, criterion).to_dict("records")
    assert (chosen["step"], chosen["score"], chosen["row"]) == (1, pytest.approx(0.7), "ERM val_budget=0.0")
    assert chosen["validation_wga"] is None


def test_the_report_draws_no_worst_group_of_validation_and_chooses_by_the_average() -> None:
    made = curves([record(0.6, None, 0), record(0.8, None, 1), record(0.7, None, 2)], "wga")
    assert made is not None
    assert made.chosen == 1
    assert made.series == {"AA test": [0.5] * 3, "WGA test": [0.25] * 3, "AA validation": [0.6, 0.8, 0.7]}
    assert made.counts["validation"] == {}
    partly = curves([record(0.6, 0.5, 0, second=0.2), record(0.8, 0.0, 1)], "aa_wga")
    assert partly is not None
    assert partly.chosen == 0
    assert partly.series["AA validation"] == [0.5, 0.8]
    assert partly.counts["validation"] == {0: 2, 1: 2}


@pytest.mark.parametrize("wga", [None, 0.5])
def test_every_way_of_choosing_still_has_a_line(wga: float | None) -> None:
    better = record(0.8, wga and wga + 0.25, 1)
    text = render(selection_tables.selection_tables([record(0.6, wga, 0), better]), "text")
    lines = re.findall(r"^ERM val_budget=0.[01] .*$", text, re.M)
    assert len(lines) == 5
    assert {tuple(line.split()[-4:]) for line in lines[:4]} == {("50.0", "25.0", "0", "1")}
    assert "val_budget: the share of the validation images" in text


def test_the_flag_of_train_and_sweep(tmp_path: Path) -> None:
    assert vars(train_arguments.parser().parse_args([]))["validation_budget"] == 1
    assert vars(train_arguments.parser().parse_args(["--validation_budget", "0.2"]))["validation_budget"] == 0.2
    assert "validation_budget" in jobs.EXTRAS
    flags = ["--output_dir", "o", "--command_launcher", "dummy", "--datasets", "DigitsO2O", "--algorithms", "ERM"]
    assert sweep_arguments.parse(["launch", *flags]).validation_budget is None
    assert sweep_arguments.parse(["launch", *flags, "--validation_budget", "0"]).validation_budget == 0
    file = tmp_path / "a.toml"
    file.write_text('validation_budget = 0.2\noutput_dir = "o"\ncommand_launcher = "dummy"\n')
    assert sweep_arguments.parse(["launch", str(file)]).validation_budget == 0.2
    file.write_text('validation_budget = "much"\noutput_dir = "o"\ncommand_launcher = "dummy"\n')
    with pytest.raises(ValueError, match="validation_budget must be a number"):
        sweep_arguments.parse(["launch", str(file)])
    assert get_dataset_class("DigitsO2O").CONFOUNDERS
