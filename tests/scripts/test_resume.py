"""Training that is asked to end, fails, or finds its disk full, and goes on as if nothing had happened.

What a kill does, at any instant, is in tests/test_kills.py.
"""

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainbed import algorithms, claims, evaluation, predictors, records, snapshots, states, training
from domainbed.algorithms.erm import ERM
from domainbed.datasets.base import MultipleDomainDataset
from domainbed.scripts import train
from domainbed.states import State

FLAGS = [
    "--dataset", "Debug28", "--algorithm", "GroupDRO", "--steps", "8", "--checkpoint_freq", "3", "--keep_best",
    "aa_wga", "--hparams", '{"backbone": "small_cnn", "batch_size": 4}', "--save_every_s", "0",
]  # fmt: skip


def main(directory: Path, *flags: str) -> int:
    return train.main([*FLAGS, *flags, "--output_dir", str(directory)])


def results(directory: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    for record in read:
        record["args"].pop("output_dir")
    return [{key: value for key, value in record.items() if key not in ("step_time", "mem_gb")} for record in read]


def assert_equal_runs(one: Path, other: Path) -> None:
    assert results(one) == results(other)
    files = {path.name for path in one.iterdir()}
    assert files == {path.name for path in other.iterdir()} >= {"done", "model.pkl", "model_best.pkl"}
    for name in (name for name in files if name.startswith("model")):
        models = [torch.load(directory / name, weights_only=True) for directory in (one, other)]
        assert models[0]["step"] == models[1]["step"]
        weights, same = (model["model_dict"] for model in models)
        assert weights.keys() == same.keys()
        assert all(torch.equal(weights[key], same[key]) for key in weights)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    assert main(directory) == 0
    return directory


def at_call(count: int, act: Any, function: Any) -> Any:
    """The function, which acts before its ``count``-th call."""
    calls = iter(range(10**6))

    def watched(*args: Any, **options: Any) -> Any:
        if next(calls) == count:
            act()
        return function(*args, **options)

    return watched


def signal_us() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (algorithms.get_algorithm_class("GroupDRO"), "update", 0),
        (algorithms.get_algorithm_class("GroupDRO"), "update", 5),
        (evaluation, "measure", 0),  # the first record is being made
        (evaluation, "measure", 9),  # two environments of the second record are measured
        (records, "append", 1),
        (snapshots, "write", 4),
        (training, "save_model", 0),
    ],
)
def test_a_request_saves_and_the_run_goes_on_from_there(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, owner: Any, name: str,
    count: int,
) -> None:  # fmt: skip
    updates: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(count, signal_us, getattr(owner, name)))
        assert main(tmp_path) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert states.read(tmp_path).state == State.PREEMPTED
    group_dro = algorithms.get_algorithm_class("GroupDRO")
    update = group_dro.update
    monkeypatch.setattr(group_dro, "update", lambda *given: updates.append(1) or update(*given))
    assert main(tmp_path) == 0
    done = int(capsys.readouterr().out.partition("resumed after ")[2].split()[0])
    assert done + len(updates) == 8
    assert_equal_runs(tmp_path, whole)
    assert states.read(tmp_path).state == State.DONE


def test_a_request_while_it_explains(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("domainbed.scripts.train_execution.explain", lambda *_: signal_us())
        assert main(tmp_path, "--explain", "4") == 75
    assert main(tmp_path, "--explain", "4") == 0
    assert (tmp_path / "explanations.jsonl").read_text().count("\n") == 1


def test_stop_requests_reach_the_run_through_its_directory(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    asked = threading.Event()

    def ask() -> None:
        claims.request_stop(tmp_path)
        while (tmp_path / "stop").exists():
            asked.wait(0.01)

    with monkeypatch.context() as patch:
        group_dro = algorithms.get_algorithm_class("GroupDRO")
        patch.setattr(group_dro, "update", at_call(4, ask, group_dro.update))
        assert main(tmp_path) == 75
    assert main(tmp_path) == 0
    assert_equal_runs(tmp_path, whole)


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_named_and_nothing_is_lost(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records, "append", at_call(2, full, records.append))
        with pytest.raises(OSError, match="No space left"):
            main(tmp_path)
    status = states.read(tmp_path)
    assert status.state == State.FAILED
    assert "the disk is full" in (status.error or "")
    assert "goes on from its last snapshot" in (status.error or "")
    assert main(tmp_path) == 0
    assert_equal_runs(tmp_path, whole)


def test_a_snapshot_that_cannot_be_written_is_a_warning(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapshots, "write", full)
    assert main(tmp_path) == 0
    assert "a snapshot could not be written ([Errno 28] No space left on device); training goes on" in caplog.text
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("no more"), "out of memory: MemoryError: no more; take a smaller batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory: .*CUDA out of memory. Tried"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: RuntimeError: "),
        (ZeroDivisionError("by zero"), "^ZeroDivisionError: by zero$"),
    ],
)
def test_failures_are_kept_until_the_run_begins_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail() -> None:
        raise error

    group_dro = algorithms.get_algorithm_class("GroupDRO")
    with monkeypatch.context() as patch:
        patch.setattr(group_dro, "update", at_call(5, fail, group_dro.update))
        with pytest.raises(type(error)):
            main(tmp_path)
    status = states.read(tmp_path)
    assert status.state == State.FAILED
    assert re.search(message, status.error or "")
    assert main(tmp_path) == 0
    assert "Traceback" in (tmp_path / "err.txt").read_text()  # the log of the first attempt stays
    assert_equal_runs(tmp_path, whole)


def test_bad_input_is_a_failure_with_its_status(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="lrr"):
        main(tmp_path, "--hparams", '{"lrr": 1}')
    failed = json.loads((tmp_path / "failed").read_text())
    assert failed["exit_status"] == 2
    assert "lrr" in failed["error"]


class Opaque(ERM):
    """Holds an iterator, which can't be kept."""

    HPARAMS: Any = {}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.numbers = iter(range(100))

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        return super().update(minibatches) | {"number": next(self.numbers)}


def test_what_cannot_be_resumed_says_so_and_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(algorithms, "Opaque", Opaque, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(records, "append", at_call(1, signal_us, records.append))
        assert main(tmp_path, "--algorithm", "Opaque") == 75
    assert "no snapshots: algorithm.numbers is a builtins.range_iterator" in caplog.text
    assert main(tmp_path, "--algorithm", "Opaque") == 0
    assert [record["number"] for record in results(tmp_path)] == [0, 2, 5, 7]


class NoisyDebug(MultipleDomainDataset):
    """Its items draw from the global generators, wherever they are opened."""

    ENVIRONMENTS = ("a", "b", "c")
    NEEDS_DATA_DIR = False
    N_WORKERS = 2

    class Environment(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            x = torch.rand(3, 28, 28) + np.random.rand()
            return x.float(), index % 2

    def __init__(self, root: Any, test_envs: Any, hparams: Any) -> None:
        super().__init__()
        self.datasets = [self.Environment() for _ in self.ENVIRONMENTS]
        self.input_shape, self.num_classes = (3, 28, 28), 2


@pytest.mark.parametrize("cores", [1, 2])
def test_random_transforms_of_foreign_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr("domainbed.datasets.NoisyDebug", NoisyDebug, raising=False)
    monkeypatch.setattr("domainbed.machine.cores", lambda: cores)
    flags = ["--dataset", "NoisyDebug", "--algorithm", "ERM", "--steps", "5"]
    plain = [flag for flag in FLAGS if flag not in ("--keep_best", "aa_wga")]

    def run(name: str) -> int:
        return train.main([*plain, *flags, "--output_dir", str(tmp_path / name)])

    assert run("whole") == 0
    with monkeypatch.context() as patch:
        erm = algorithms.get_algorithm_class("ERM")
        patch.setattr(erm, "update", at_call(3, signal_us, erm.update))
        assert run("cut") == 75
    assert run("cut") == 0
    files = (tmp_path / name / "model.pkl" for name in ("whole", "cut"))
    one, other = (torch.load(file, weights_only=True)["model_dict"] for file in files)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_that_slept_and_was_replaced_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        assert code == 73
        raise Ended

    def replaced() -> None:
        (claim,) = tmp_path.glob("claim.*")
        claim.unlink()

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(records, "append", at_call(1, lambda: pytest.fail("it wrote"), records.append))
    group_dro = algorithms.get_algorithm_class("GroupDRO")
    monkeypatch.setattr(group_dro, "update", at_call(2, replaced, group_dro.update))
    with pytest.raises(Ended):
        main(tmp_path)


def run_cut_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Any, *flags: str) -> tuple[Path, Path]:
    """An undisturbed run, and one during which ``act(patch)`` arranges for a request to end; both are done."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(whole, *flags) == 0
    with monkeypatch.context() as patch:
        act(patch)
        assert main(cut, *flags) == 75
    assert main(cut, *flags) == 0
    return whole, cut


def in_update(count: int) -> Any:
    def arrange(patch: pytest.MonkeyPatch) -> None:
        group_dro = algorithms.get_algorithm_class("GroupDRO")
        patch.setattr(group_dro, "update", at_call(count, signal_us, group_dro.update))

    return arrange


def test_domain_adaptation_goes_on_with_the_next_unlabelled_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group_dro = algorithms.get_algorithm_class("GroupDRO")
    update = group_dro.update

    def seen(self: Any, batches: Any, unlabeled: Any) -> dict[str, float]:
        return update(self, batches) | {"seen": float(unlabeled[0].sum())}

    monkeypatch.setattr(group_dro, "update", seen)
    flags = ("--task", "domain_adaptation", "--uda_holdout_fraction", "0.5")
    assert_equal_runs(*run_cut_and_run_again(tmp_path, monkeypatch, in_update(4), *flags))


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [(training, "save_model", 0), (training, "save_model", 3), (records, "append", 1), (evaluation, "measure", 4)],
)
def test_the_models_of_checkpoints_are_those_of_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int
) -> None:
    def arrange(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(owner, name, at_call(count, signal_us, getattr(owner, name)))

    whole, cut = run_cut_and_run_again(tmp_path, monkeypatch, arrange, "--save_model_every_checkpoint")
    assert_equal_runs(whole, cut)
    files = {path.name: path for path in cut.glob("model_step*.pkl")}
    assert set(files) == {f"model_step{step}.pkl" for step in (0, 3, 6, 7)}  # DomainBed's names
    last, same = (
        torch.load(path, weights_only=True)["model_dict"] for path in (cut / "model.pkl", files["model_step7.pkl"])
    )
    assert all(torch.equal(last[key], same[key]) for key in last)
    assert [predictors.load(path, "cpu").step for _, path in sorted(files.items())] == [0, 3, 6, 7]


SOON_OVER = '{"backbone": "small_cnn", "batch_size": 4, "patience": 2, "min_delta": 1.0}'


@pytest.mark.parametrize("count", [2, 4, 6])
def test_early_stopping_goes_on_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    whole, cut = run_cut_and_run_again(tmp_path, monkeypatch, in_update(count), "--hparams", SOON_OVER)
    assert_equal_runs(whole, cut)
    assert [record["step"] for record in results(cut)] == [0, 3, 6]


def test_a_run_that_was_stopped_early_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--hparams", SOON_OVER, "--explain", "2")
    patched = "domainbed.scripts.train_execution.explain"
    assert_equal_runs(
        *run_cut_and_run_again(
            tmp_path, monkeypatch, lambda patch: patch.setattr(patched, lambda *_: signal_us()), *flags
        )
    )


class Predicts(ERM):
    """Its predictions draw random numbers, change a buffer, or go on whatever happens."""

    HPARAMS: Any = {}
    way = ""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(()))

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        return super().update([(x + 0.1 * torch.randn_like(x), y) for x, y in minibatches]) | {"seen": self.seen.item()}

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().predict(x)
        if self.training:
            return logits
        try:
            self.interrupt()
            return logits + (0.1 * torch.randn_like(logits) if self.way == "noisy" else 0)
        except Exception:
            return -logits
        finally:
            if self.way == "adapting":
                self.seen += 1

    def interrupt(self) -> None:
        pass


@pytest.mark.parametrize("way", ["noisy", "adapting", "swallowing"])
def test_whatever_predicting_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, way: str
) -> None:
    monkeypatch.setattr(algorithms, "Predicts", Predicts, raising=False)
    monkeypatch.setattr(Predicts, "way", way)

    def arrange(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Predicts, "interrupt", at_call(4, signal_us, Predicts.interrupt))

    whole, cut = run_cut_and_run_again(tmp_path, monkeypatch, arrange, "--algorithm", "Predicts")
    assert_equal_runs(whole, cut)
    assert ("not saved" in capsys.readouterr().err) == (way == "adapting")
    assert "Preempted" not in (cut / "err.txt").read_text()


def test_another_runs_command_leaves_a_snapshot_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        in_update(0)(patch)
        assert main(tmp_path) == 75
    printed = (tmp_path / "out.txt").read_text()
    with pytest.raises(Exception, match="holds another run"):
        main(tmp_path, "--seed", "5")
    assert states.read(tmp_path).state == State.PREEMPTED
    assert (tmp_path / "out.txt").read_text() == printed
    assert main(tmp_path) == 0
    assert_equal_runs(tmp_path, whole)


def test_a_snapshot_that_a_kill_left_in_a_finished_run_takes_nothing_from_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        in_update(4)(patch)
        assert main(tmp_path) == 75
    left = (tmp_path / "snapshot.pkl").read_bytes()
    assert main(tmp_path) == 0
    (tmp_path / "snapshot.pkl").write_bytes(left)  # killed right after it was done
    assert main(tmp_path) == 0
    assert_equal_runs(tmp_path, whole)


def test_other_data_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        in_update(3)(patch)
        assert main(tmp_path) == 75
    content = snapshots.read(tmp_path / "snapshot.pkl")
    content["task"] |= {"group_counts": (1, 1, 1, 1)}
    snapshots.write(tmp_path, content)
    assert main(tmp_path) == 0
    assert "the run starts over: the data were those of" in caplog.text


def test_how_far_it_is_shows_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    seen: list[tuple[int | None, int | None]] = []

    def look() -> None:
        deadline = threading.Event()
        while states.read(tmp_path).step != 5:
            assert not deadline.wait(0.01)
        seen.append((states.read(tmp_path).step, states.read(tmp_path).steps))

    with monkeypatch.context() as patch:
        group_dro = algorithms.get_algorithm_class("GroupDRO")
        patch.setattr(group_dro, "update", at_call(5, look, group_dro.update))
        assert main(tmp_path) == 0
    assert seen == [(5, 8)]
