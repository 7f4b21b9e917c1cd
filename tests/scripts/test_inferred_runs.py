"""Runs with ``--confounders inferred:METHOD``: from train to records and heatmaps."""

import json
from pathlib import Path

import pytest

from domainbed import inferred_confounders
from domainbed.scripts import BadInput, check_jobs, train

FLAGS = [
    "--dataset", "DigitsO2O", "--steps", "3", "--hparams", '{"batch_size": 8}', "--eval_splits", "selection",
    "--skip_model_save",
]  # fmt: skip


def run(directory: Path, *flags: str) -> list[dict]:
    assert train.main([*FLAGS, *flags, "--output_dir", str(directory)]) == 0
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def test_true_confounders_say_nothing_to_a_network_that_learned_others(tmp_path: Path) -> None:
    """Four true values, two inferred ones: heatmaps of the confounder network are those of its predictions."""
    flags = ["--algorithm", "EX2L_JSDistance", "--confounders", "inferred:errors", "--explain", "4"]
    (record, *_) = run(tmp_path, *flags)
    assert record["inferred_values"] == 2
    assert {"inferred_ami", "inferred_ami_within_labels"} <= record.keys()
    assert len([key for key in record if key.startswith("env0_in_g") and key.endswith("_n")]) == 4  # groups are true
    assert (tmp_path / "explanations.jsonl").exists()


def test_a_run_that_goes_on_infers_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--algorithm", "GroupDRO", "--partition", "group", "--confounders", "inferred:george"]
    first = run(tmp_path, *flags)
    monkeypatch.setattr(inferred_confounders, "look", lambda *_: pytest.fail("the quick network was trained again"))
    again = run(tmp_path, *flags, "--overwrite")
    assert first[-1]["loss"] == again[-1]["loss"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["inferred:georg"], "way to infer confounders not found: georg; did you mean george"),
        (["inferred:errors", "inferred:ex2l"], "what is inferred stands alone; name one"),
    ],
)
def test_what_can_not_be_inferred(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(tmp_path, "--algorithm", "ERM", "--confounders", *names)
    args = {"dataset": "DigitsO2O", "algorithm": "ERM", "confounders": names}
    assert message in (check_jobs.problem(args) or "")
    assert check_jobs.problem(args | {"confounders": ["inferred:errors"]}) is None
