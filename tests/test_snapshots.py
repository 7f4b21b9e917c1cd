"""Snapshots of a small algorithm, and what becomes of damaged ones."""

import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from domainbed import records, snapshots, training

HPARAMS = {"lr": 0.5}
ARGS = {"algorithm": "Any", "seed": 1, "test_envs": [0]}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.optimizer = torch.optim.Adam(self.layer.parameters())

    def update(self) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(4, 2) + random.random() + np.random.normal()
        self.layer(x).pow(2).mean().backward()
        self.optimizer.step()


def record(directory: Path, step: int) -> None:
    records.append(directory / "results.jsonl", {"step": step, "args": ARGS})


def save(directory: Path, algorithm: Any, progress: Any) -> None:
    snapshots.write(directory, snapshots.take(directory, algorithm, progress, {"args": ARGS, "hparams": HPARAMS}))


def steps(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory with the snapshots of steps 3 and 6, each after its record, and two records more."""
    algorithm, progress = Small(), training.Progress()
    for step in (3, 6):
        record(tmp_path, step)
        progress.step = step
        save(tmp_path, algorithm, progress)
    record(tmp_path, 7)
    record(tmp_path, 8)
    return tmp_path


def loaded_step(directory: Path) -> int | None:
    content = snapshots.load(directory, ARGS, HPARAMS)
    if content is None:
        return None
    progress = training.Progress()
    snapshots.restore(directory, content, Small(), progress)
    return progress.step


def test_weights_optimizer_and_all_random_numbers_go_on(tmp_path: Path) -> None:
    algorithm = Small()
    algorithm.update()
    save(tmp_path, algorithm, training.Progress(step=1, values={"loss": [0.5]}))
    for _ in range(3):
        algorithm.update()

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    fresh, progress, content = Small(), training.Progress(), snapshots.load(tmp_path, ARGS, HPARAMS)
    assert content is not None
    snapshots.restore(tmp_path, content, fresh, progress)
    assert progress == training.Progress(step=1, values={"loss": [0.5]})
    for _ in range(3):
        fresh.update()
    assert torch.equal(fresh.layer.weight, algorithm.layer.weight)


def test_the_newest_is_taken_and_later_records_are_cut(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert loaded_step(two) == 6
    assert steps(two) == [3, 6]
    assert not caplog.records


def test_none_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert snapshots.load(tmp_path, ARGS, HPARAMS) is None
    assert not caplog.records


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def something_else(path: Path) -> None:
    torch.save({"hello": "world"}, path)


DAMAGES = [cut_in_half, flip_a_bit, empty, something_else]


def test_whatever_changes_in_the_file_is_seen(tmp_path: Path) -> None:
    snapshots.write(tmp_path, {"value": 1.5})
    whole = (tmp_path / "snapshot.pkl").read_bytes()
    assert snapshots.read(tmp_path / "snapshot.pkl") == {"value": 1.5}
    changed = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(len(whole))]
    for content in [*changed, *(whole[:length] for length in range(len(whole)))]:
        (tmp_path / "snapshot.pkl").write_bytes(content)
        with pytest.raises(snapshots.Unusable):
            snapshots.read(tmp_path / "snapshot.pkl")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_for_the_one_before(
    two: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    damage(two / "snapshot.pkl")
    assert loaded_step(two) == 3
    assert steps(two) == [3]
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
    assert "snapshot.pkl" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_both_are_damaged_there_is_none(two: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    damage(two / "snapshot.pkl")
    damage(two / "snapshot_previous.pkl")
    assert loaded_step(two) is None
    assert "snapshot_previous.pkl" in caplog.text


def test_one_alone_is_enough(two: Path) -> None:
    (two / "snapshot.pkl").unlink()  # killed between the two moves
    assert loaded_step(two) == 3


@pytest.mark.parametrize(("line", "expected"), [(1, 3), (0, None)])
def test_records_that_changed_behind_it_are_not_gone_on_with(
    two: Path, caplog: pytest.LogCaptureFixture, line: int, expected: int | None
) -> None:
    lines = (two / "results.jsonl").read_text().splitlines(keepends=True)
    lines[line] = lines[line][:10] + "\n"
    (two / "results.jsonl").write_text("".join(lines))
    assert loaded_step(two) == expected
    assert "results.jsonl is not as it was when the snapshot was written" in caplog.text


def test_lost_records(two: Path) -> None:
    (two / "results.jsonl").unlink()
    assert loaded_step(two) is None


def test_another_runs_snapshot_is_refused(two: Path) -> None:
    with pytest.raises(ValueError, match=r"holds another run \(seed: 1 there, 2 now"):
        snapshots.load(two, ARGS | {"seed": 2}, HPARAMS)
    assert steps(two) == [3, 6, 7, 8]


def test_an_argument_that_it_lacks_had_its_default(two: Path) -> None:
    args = ARGS | {"new": "default"}
    assert snapshots.load(two, args, HPARAMS, {"new": "default", "seed": 7}) is not None


def test_other_hparams_start_over(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert snapshots.load(two, ARGS, {"lr": 1.0}) is None
    assert "the hparams were {'lr': 0.5} and are {'lr': 1.0}" in caplog.text


def test_a_snapshot_from_before_the_first_record_leaves_none(tmp_path: Path) -> None:
    save(tmp_path, Small(), training.Progress())
    record(tmp_path, 0)
    assert loaded_step(tmp_path) == 0
    assert steps(tmp_path) == []


def test_another_torch_is_said(two: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    version = torch.__version__
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert loaded_step(two) == 6
    assert f"began with torch {version} on cpu and goes on with torch 9.9 on cpu" in caplog.text


def test_a_damaged_one_never_takes_the_place_of_the_good_one(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_a_bit(two / "snapshot.pkl")
    assert loaded_step(two) == 3
    moves, replace = iter([0, 1]), os.replace

    def killed(source: Any, target: Any) -> None:
        if next(moves) or not Path(target).name.endswith("previous.pkl"):  # before it is moved to its place
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(two, Small(), training.Progress(step=5))
    assert loaded_step(two) == 3


def test_a_failed_write_leaves_the_last_one_and_no_rubbish(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (two / "snapshot.pkl").read_bytes(), (two / "snapshot_previous.pkl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(two, Small(), training.Progress())
    assert ((two / "snapshot.pkl").read_bytes(), (two / "snapshot_previous.pkl").read_bytes()) == before
    assert not list(two.glob("*.partial"))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("save_every_s", "took", "wait"), [(60, 1, 60), (60, 3, 150), (0, 3, 0), (200, 3, 200)])
def test_when_the_next_is_due(save_every_s: float, took: float, wait: float) -> None:
    clock = Clock()
    schedule = snapshots.Schedule(save_every_s, clock)
    assert schedule.is_due() == (save_every_s == 0)
    clock.now += save_every_s
    assert schedule.is_due()
    clock.now += took
    schedule.done(clock.now - took)
    clock.now += max(0, wait - 0.5)
    assert schedule.is_due() == (save_every_s == 0)
    clock.now += 0.5
    assert schedule.is_due()
