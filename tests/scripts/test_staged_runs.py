"""Methods with stages: their runs hold the last stage's checkpoints only, and go on from inside every stage."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from domainbed import algorithms
from domainbed.algorithms.erm import ERM
from domainbed.lib.misc import predicted_labels
from domainbed.samples import StageData
from domainbed.scripts import train, train_execution
from domainbed.stages import Stage

CALLS: list[tuple[str, int]] = []  # what was asked of Three, and how many images its features were of


class Three(ERM):
    """By images, by images with odds, by features; notes what it is asked."""

    HPARAMS = {}
    PARTITION = "group"
    STAGES = (
        Stage("all", 0.4, "random"),
        Stage("odd", 0.3, "random"),
        Stage("head", of_features=True),
    )

    def begin_stage(self, stage: str, data: StageData) -> NDArray[np.float64] | None:
        CALLS.append((stage, len(data.training)))
        assert not self.training
        assert not torch.is_grad_enabled()
        if stage == "head":
            self.optimizer = torch.optim.SGD(self.classifier.parameters(), lr=0.1, momentum=0.9)
            return None
        predicted = data.training.map(lambda x: predicted_labels(self.predict(x)))
        wrong = predicted.numpy() != data.training.examples.y
        return np.where(wrong, 5.0, 1.0)

    def stage_features(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(("features", len(x)))
        return self.featurizer(x)

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        if minibatches[0][0].ndim == 4:
            return super().update(minibatches)
        x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
        loss = torch.nn.functional.cross_entropy(self.classifier(x), y)
        self.step(loss)
        return {"loss": loss.item(), "parts": len(minibatches)}


@pytest.fixture(autouse=True)
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "Three", Three, raising=False)
    CALLS.clear()


FLAGS = [
    "--dataset", "Debug28", "--steps", "10", "--checkpoint_freq", "2", "--keep_best", "aa_wga", "--save_every_s", "0",
    "--hparams", '{"backbone": "small_cnn", "batch_size": 4}', "--annotation_budget", "0.5",
]  # fmt: skip


def main(directory: Path, *flags: str, algorithm: str = "Three") -> int:
    return train.main([*FLAGS, "--algorithm", algorithm, *flags, "--output_dir", str(directory)])


def results(directory: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    for record in read:
        record["args"].pop("output_dir")
    return [{key: value for key, value in record.items() if key not in ("step_time", "mem_gb")} for record in read]


def weights(directory: Path, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(directory / name, weights_only=True)["model_dict"]
    return found


def assert_equal_runs(one: Path, other: Path) -> None:
    assert results(one) == results(other)
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for name in ("model.pkl", "model_best.pkl"):
        pairs = zip(weights(one, name).values(), weights(other, name).values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_stages_follow_each_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Only the last stage is measured and recorded; features are made once, of every training image."""
    assert main(tmp_path) == 0
    found = results(tmp_path)
    assert [record["step"] for record in found] == [8, 9]  # the last stage begins with step 7
    assert all(record["parts"] > 1 for record in found)
    assert all("env0_in_wga" in record for record in found)
    printed = capsys.readouterr().out
    assert "stage 2 of 3, odd, after 4 updates" in printed
    assert "stage 3 of 3, head, after 7 updates" in printed
    (odd, n), (head, again), *features = CALLS
    assert (odd, head) == ("odd", "head")
    assert n == again == sum(length for _, length in features)
    assert {name for name, _ in features} == {"features"}


def test_a_featurizer_that_no_stage_trains_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[dict[str, torch.Tensor]] = []
    begin = Three.begin_stage

    def noting(self: Any, stage: str, data: StageData) -> Any:
        before.append({key: value.clone() for key, value in self.state_dict().items()})
        return begin(self, stage, data)

    monkeypatch.setattr(Three, "begin_stage", noting)
    assert main(tmp_path) == 0
    after = weights(tmp_path, "model.pkl")
    assert all(torch.equal(before[1][key], after[key]) for key in after if key.startswith("featurizer"))
    assert not torch.equal(before[1]["classifier.weight"], after["classifier.weight"])


def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, owner: Any, name: str, count: int) -> None:
    """A run that is asked to end before the ``count``-th call of something, goes on and ends as an undisturbed one."""
    assert main(tmp_path / "whole", algorithm=algorithm) == 0
    calls, function = iter(range(10**6)), getattr(owner, name)

    def watched(*args: Any, **options: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, watched)
        assert main(tmp_path / "cut", algorithm=algorithm) == 75
    assert main(tmp_path / "cut", algorithm=algorithm) == 0
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("update", count) for count in (0, 3, 4, 5, 6, 7, 8, 9)),
        ("begin_stage", 0),
        ("begin_stage", 1),
        ("stage_features", 0),
        ("stage_features", 1),
    ],
)
def test_a_run_goes_on_from_inside_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    cut(tmp_path, monkeypatch, "Three", Three, name, count)


@pytest.mark.parametrize("algorithm", ["JTT", "CRT", "ReWeightCRT", "DFR", "DFR_Training"])
@pytest.mark.parametrize("count", [2, 9])
def test_the_packages_own_go_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, count: int
) -> None:
    cut(tmp_path, monkeypatch, algorithm, algorithms.get_algorithm_class(algorithm), "update", count)


def test_killed_between_two_stages_it_begins_the_second_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage has changed before it was over is not kept."""

    def fails(self: Any, stage: str, data: StageData) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        raise RuntimeError("a stage that fails halfway")

    with monkeypatch.context() as patch:
        patch.setattr(Three, "begin_stage", fails)
        with pytest.raises(RuntimeError, match="halfway"):
            main(tmp_path / "cut")
    assert main(tmp_path / "cut") == 0
    assert main(tmp_path / "whole") == 0
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.parametrize(("steps", "message"), [("2", "2 steps are too few for the stages all, odd, head")])
def test_too_few_steps(tmp_path: Path, steps: str, message: str) -> None:
    from domainbed.scripts import BadInput

    with pytest.raises(BadInput, match=message):
        main(tmp_path, "--steps", steps)


def test_an_algorithm_without_stages_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[Any]] = []
    execution = train_execution.Execution

    def watched(run: Any, *more: Any) -> Any:
        seen.append(run.stages)
        return execution(run, *more)

    monkeypatch.setattr(train, "Execution", watched)
    assert main(tmp_path, algorithm="ERM") == 0
    assert [stage.plan.steps for stage in seen[0]] == [10]
