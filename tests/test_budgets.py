"""Every algorithm at every annotation budget, through the train script: stages, hidden confounders, selection."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainbed import algorithms, model_selection, splits
from domainbed.algorithms.erm import ERM
from domainbed.datasets import debug
from domainbed.scripts import BadInput, train

# Algorithms that learn from masks are left out: Debug28 has none.
NAMES = [name for name in algorithms.ALGORITHMS if not algorithms.get_algorithm_class(name).NEEDS_MASKS]
# Those to which annotations are more than a measure, with partitions that are not their own, and controls of that.
READERS = [
    "ERM", "ERM:group", "ERM:confounder", "GroupDRO:group", "IRM:group", "EX2L_MAE", "RRR_Confounder", "ALIGN:group",
    "RWG", "RWY", "SUBG", "SUBY", "ReWeight", "CVaR_DRO", "LfF", "LISA", "InBatchMixup", "CDAN", "MMD_GivenLabel",
    "CORAL_GivenLabel", "JTT", "CRT", "ReWeightCRT", "DFR", "DFR_Training",
]  # fmt: skip
FLAGS = [
    "--dataset", "Debug28", "--hparams", '{"backbone": "small_cnn", "batch_size": 6}', "--steps", "4",
    "--checkpoint_freq", "2", "--holdout_fraction", "0.4", "--test_envs", "0", "--keep_best", "aa_wga",
]  # fmt: skip
TRAINING, VALIDATION = 20, 12  # images of the environments 1 and 2


def run(directory: Path, row: str, budget: float, *flags: str) -> list[dict[str, Any]]:
    """The records of a run at a budget of training and of validation annotations."""
    algorithm, _, partition = row.partition(":")
    budgets = ["--annotation_budget", str(budget), "--validation_budget", str(budget)]
    chosen = ["--algorithm", algorithm, *(["--partition", partition] if partition else []), *budgets]
    assert train.main([*FLAGS, *chosen, "--output_dir", str(directory), *flags]) == 0
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def validation_images(record: dict[str, Any]) -> int:
    """How many validation images the record's groups are of."""
    return sum(n for key, n in record.items() if re.fullmatch(r"env[12]_out_g\d+_n", key))


def check(records: list[dict[str, Any]], budget: float) -> None:
    """Finite numbers, and of validation the groups of the annotated images only."""
    assert records[-1]["step"] == 3
    for record in records:
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, int | float))
        assert "env0_in_wga" in record  # tests are measured on all of their annotations
        assert validation_images(record) == round(budget * VALIDATION)
        assert [record.get(f"env{env}_out_n") for env in (1, 2)] == ([6, 6] if budget < 1 else [None, None])
        for env in (1, 2):
            assert 0 <= record[f"env{env}_out_acc"] <= 1
            grouped = {key for key in record if re.match(rf"env{env}_out_(g|wga|adj)", key)}
            assert bool(grouped) == any(re.fullmatch(rf"env{env}_out_g\d+_n", key) for key in record)


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_trains_without_annotations(tmp_path: Path, name: str) -> None:
    check(run(tmp_path, name, 0, "--skip_model_save"), 0)


@pytest.mark.parametrize("budget", [0.05, 1])
@pytest.mark.parametrize("row", READERS)
def test_one_annotated_image_and_all_of_them(tmp_path: Path, row: str, budget: float) -> None:
    check(run(tmp_path, row, budget, "--skip_model_save"), budget)


def hidden(budget: float) -> set[tuple[int, int]]:
    """The images (environment, position) that may not matter: those of the test environment, and what is hidden."""
    data = debug.Debug28(None, [0], {})
    every = splits.split_environments(data, [0], 0.4)
    kinds = {"training": splits.training_splits, "validation": splits.validation_splits}
    budgeted = [split for of, some in kinds.items() for split in splits.annotate(some(data, every, [0]), budget, 0, of)]
    assert all(split.annotated is not None for split in budgeted)
    found = {(split.env, int(key)) for split in budgeted for key in split.keys[split.c < 0]}
    assert len(found) == TRAINING + VALIDATION - round(budget * TRAINING) - round(budget * VALIDATION)
    return found | {(0, key) for key in range(16)}


def annotate_otherwise(monkeypatch: pytest.MonkeyPatch, images: set[tuple[int, int]]) -> None:
    """From now on, Debug28 has the other confounder value at these images."""
    original = debug.Debug28.__init__

    def changed(self: Any, *args: Any) -> None:
        original(self, *args)
        for env, key in images:
            self.datasets[env].c[key] ^= 1

    monkeypatch.setattr(debug.Debug28, "__init__", changed)


def measured_truth(key: str) -> bool:
    """Whether a key says how well the true groups of the test or training images are met, or how many there are.

    The adjusted accuracy of any split weights groups as the true ones of training are; it is but reported.
    """
    if key.endswith("_adj_acc") or re.fullmatch(r"train_g\d+_n", key):
        return True
    return re.fullmatch(r"env(0_[a-z]+|[12]_in)_(wga|group_mean_acc|g\d+_(acc|n))", key) is not None


def recorded(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for record in records:
        record["args"].pop("output_dir")
    apart = ("step_time", "mem_gb")
    return [{k: v for k, v in record.items() if not measured_truth(k) and k not in apart} for record in records]


def models(directory: Path) -> Iterator[dict[str, Any]]:
    for name in ("model.pkl", "model_best.pkl"):
        yield torch.load(directory / name, weights_only=True)


def assert_same_models(one: Path, other: Path) -> None:
    for a, b in zip(models(one), models(other), strict=True):
        assert a["model_dict"].keys() == b["model_dict"].keys()
        assert all(torch.equal(a["model_dict"][key], b["model_dict"][key]) for key in a["model_dict"])
        assert a["task"] == b["task"]
        assert a.get("step") == b.get("step")


@pytest.mark.parametrize("row", READERS)
def test_no_run_depends_on_a_hidden_annotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """With other confounders wherever they are hidden, the same is trained, recorded, saved and selected."""
    before = run(tmp_path / "one", row, 0.5, "--eval_splits", "all")
    annotate_otherwise(monkeypatch, hidden(0.5))
    after = run(tmp_path / "other", row, 0.5, "--eval_splits", "all")
    assert any(one[key] != other.get(key) for one, other in zip(before, after, strict=True) for key in one)
    for criterion in model_selection.CRITERIA:
        steps = [[choice.step for choice in model_selection.choose(found, criterion)] for found in (before, after)]
        assert steps[0] == steps[1]
        assert len(steps[0]) == 1
    assert recorded(before) == recorded(after)
    assert_same_models(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("row", ["RWG", "GroupDRO:group", "EX2L_MAE", "ReWeight", "JTT", "DFR", "DFR_Training"])
def test_what_is_granted_does_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """Else the test above would hold for whatever reads no annotation at all. JTT's only use is selection."""
    before = run(tmp_path / "one", row, 0.5)
    granted = {(env, key) for env in (1, 2) for key in range(0, 16, 3)} - hidden(0.5)
    annotate_otherwise(monkeypatch, granted)
    after = run(tmp_path / "other", row, 0.5)
    weights = [next(models(tmp_path / place))["model_dict"] for place in ("one", "other")]
    same = all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert same == (row == "JTT")
    assert recorded(before) != recorded(after)


class Reader(ERM):
    """ERM of somebody who counts on every confounder being there."""

    HPARAMS = {}
    NEEDS_CONFOUNDERS = True

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        assert all((minibatch.c >= 0).all() for minibatch in minibatches)
        return super().update(minibatches)


def test_what_counts_on_confounders_gets_annotated_images_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithms, "Reader", Reader, raising=False)
    check(run(tmp_path / "half", "Reader", 0.5, "--skip_model_save"), 0.5)
    for budget in (0, 0.05):
        message = f"Reader learns from confounder labels and needs two values .* within --annotation_budget {budget}"
        with pytest.raises(BadInput, match=message):
            run(tmp_path / str(budget), "Reader", budget)


def test_hidden_is_what_the_budget_leaves() -> None:
    assert hidden(0) >= hidden(0.05) >= hidden(0.5)
    assert np.unique([env for env, _ in hidden(0.5)]).tolist() == [0, 1, 2]
