"""Domain adaptation: which images of test environments algorithms see, and sweeps of it from launch to tables."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainbed import algorithms, predictors
from domainbed.algorithms import ERM
from domainbed.scripts import BadInput, collect_results, sweep, train
from domainbed.scripts.train_arguments import completed
from domainbed.scripts.train_building import build_data

TASK = ["--task", "domain_adaptation", "--uda_holdout_fraction", "0.5"]
QUICK = ["--steps", "3", "--checkpoint_freq", "2", "--hparams", '{"backbone": "small_cnn", "batch_size": 4}']


class Adapting(ERM):
    """Written as for DomainBed: pulls the mean features of unlabelled images to those of the labelled ones."""

    def update(self, minibatches, unlabeled=None):
        all_x = torch.cat([x for x, y in minibatches])
        all_y = torch.cat([y for x, y in minibatches])
        features = self.featurizer(all_x)
        gap = sum((features.mean(0) - self.featurizer(x).mean(0)).pow(2).mean() for x in unlabeled)
        loss = torch.nn.functional.cross_entropy(self.classifier(features), all_y) + gap
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), "gap": gap.item()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """The unlabelled images of each step of ``Spy``, an ``Adapting``."""
    steps: list[list[torch.Tensor]] = []

    class Spy(Adapting):
        def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
            steps.append(unlabeled)
            return super().update(minibatches, unlabeled)

    monkeypatch.setattr(algorithms, "Spy", Spy, raising=False)
    return steps


def run(directory: Path, *flags: str) -> list[dict[str, Any]]:
    assert train.main([*TASK, *QUICK, "--algorithm", "Spy", *flags, "--output_dir", str(directory)]) == 0
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def pictures(environment: Any, keys: Any) -> set[bytes]:
    return {environment[int(key)][0].numpy().tobytes() for key in keys}


@pytest.mark.parametrize("dataset", ["Debug28", "DigitsM2M"])
def test_an_algorithm_sees_images_of_the_uda_splits_alone(seen: Any, tmp_path: Path, dataset: str) -> None:
    found = run(tmp_path, "--dataset", dataset, "--test_envs", "1", "2")
    _, splits = build_data(completed(found[0]["args"]), found[0]["hparams"])
    udas = [split for split in splits if split.kind == "uda"]
    assert [split.env for split in udas] == [1, 2]
    assert len(seen) == 3
    for split, batches in zip(udas, zip(*seen, strict=True), strict=True):
        given = {row.numpy().tobytes() for x in batches for row in x}
        others = [other for other in splits if other.env == split.env and other.kind != "uda"]
        held_out = set().union(*(pictures(other.environment, other.keys) for other in others))
        assert {tuple(x.shape) for x in batches} == {(4, *batches[0].shape[1:])}
        assert given <= pictures(split.environment, split.keys)
        assert not given & held_out
        assert len(given) > 4  # of another step, other images
    assert {"gap", "env0_uda_acc", "env1_uda_acc"} <= found[-1].keys()
    assert "env2_uda_acc" not in found[-1]


def test_accuracy_is_that_of_the_uda_split_of_the_kth_test_environment(seen: Any, tmp_path: Path) -> None:
    record = run(tmp_path, "--dataset", "Debug28", "--test_envs", "2")[-1]
    _, splits = build_data(completed(record["args"]), record["hparams"])
    split = splits[-1]
    assert (split.env, split.kind, len(split)) == (2, "uda", 6)  # of 16: 3 held out, half of 13
    x = torch.stack([split.environment[int(key)][0] for key in split.keys])
    right = predictors.load(tmp_path, "cpu").predict(x).labels == split.y
    assert record["env0_uda_acc"] == pytest.approx(np.mean(right))


def test_labels_of_unlabelled_images_balance_nothing(
    seen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "plain", "--dataset", "DigitsM2M")
    plain = [x for (x,) in seen]
    seen.clear()
    balanced = '{"backbone": "small_cnn", "batch_size": 4, "class_balanced": true}'
    run(tmp_path / "balanced", "--dataset", "DigitsM2M", "--hparams", balanced)
    assert all(torch.equal(x, other) for x, (other,) in zip(plain, seen, strict=True))


@pytest.mark.parametrize("fraction", ["0", "0.001"])
def test_without_unlabelled_images_there_is_no_adaptation(seen: Any, tmp_path: Path, fraction: str) -> None:
    with pytest.raises(BadInput, match=r"needs unlabelled images; give --uda_holdout_fraction 0\.5, say"):
        run(tmp_path, "--dataset", "Debug28", "--uda_holdout_fraction", fraction)


PLUGIN = f"""
import torch
import domainbed.algorithms
from domainbed.algorithms import ERM

{re.search(r"^class Adapting.*?(?=^@)", Path(__file__).read_text(), re.M | re.S)[0]}

domainbed.algorithms.Adapting = Adapting
"""


def test_a_sweep_from_launch_to_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    monkeypatch.setenv("DOMAINBED_PLUGINS", str(tmp_path / "mine.py"))
    monkeypatch.setattr(algorithms, "Adapting", Adapting, raising=False)
    words = [
        "launch", "--datasets", "Debug28", "--algorithms", "ERM", "Adapting", "--n_hparams", "1", "--n_trials", "1",
        "--single_test_envs", "--command_launcher", "local", "--skip_confirmation", "--output_dir", str(tmp_path / "s"),
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"nothing was launched.*\n.*ERM.*needs unlabelled images; give --uda_holdout"):
        sweep.main([*words, *QUICK, *TASK[:2]])
    assert not (tmp_path / "s").exists()
    assert sweep.main([*words, *QUICK, *TASK]) == 0
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(tmp_path / "s")]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+) +(?:\d+\.\d \+/- 0\.0 +){3}", printed, re.M)[:2] == ["ERM", "Adapting"]
    assert "Total records: 12" in printed
