"""The two-stage script end to end, on Debug28 and an embedded set."""

import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainbed import algorithms, datasets, interruption, partitions
from domainbed.algorithms.erm import ERM
from domainbed.loaders import TrainingLoader
from domainbed.scripts import BadInput, collect_results, list_top_hparams, train, train_autolr
from domainbed.splits import split_environments, training_splits

HPARAMS = {"backbone": "small_cnn", "batch_size": 4}
QUICK = ["--dataset", "Debug28", "--steps", "12", "--checkpoint_freq", "2"]


class Stepped(ERM):
    """Divides its learning rate by 10 at each checkpoint that it is told to in ``CHANGES``; the last one is the end."""

    HPARAMS = {}
    CHANGES = (2, 4)
    seen: list[Any] = []

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.schedule: list[list[float]] = []

    def set_lr(self, eval_loaders_iid: Any = None, schedule: Any = None, device: Any = None) -> Any:
        (group,) = self.optimizer.param_groups
        if schedule is not None:
            group["lr"] = schedule[0][0]
            return schedule[1:]
        self.seen.append([(len(loader), [len(x) for x, _ in loader]) for loader in eval_loaders_iid])
        if len(self.schedule) in self.CHANGES:
            group["lr"] /= 10
        self.schedule.append([0.0] if len(self.schedule) == self.CHANGES[-1] else [group["lr"]])
        return self.schedule


@pytest.fixture(autouse=True)
def stepped(monkeypatch: pytest.MonkeyPatch) -> type[Stepped]:
    monkeypatch.setattr(algorithms, "Stepped", Stepped, raising=False)
    monkeypatch.setattr(Stepped, "seen", [])
    return Stepped


def main(directory: Path, *flags: str, algorithm: str = "Stepped", **hparams: Any) -> int:
    text = json.dumps(HPARAMS | hparams)
    words = [*QUICK, "--algorithm", algorithm, "--hparams", text, "--output_dir", str(directory), *flags]
    return train_autolr.main(words)


def stages(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of the first and of the second, which follows it."""
    found = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    second = [record["args"]["holdout_fraction"] == 0 for record in found]
    assert second == sorted(second)
    return found[: second.index(True)], found[second.index(True) :]


def of(records: list[dict[str, Any]], key: str) -> list[Any]:
    return [record[key] for record in records]


def test_the_second_stage_follows_what_the_first_has_found(tmp_path: Path) -> None:
    assert main(tmp_path) == 0
    first, second = stages(tmp_path)
    assert of(first, "step") == of(second, "step") == [0, 2, 4, 6]  # at step 8 the first stage saw the end
    lr, *_ = of(first, "lr")
    assert of(first, "lr") == pytest.approx([lr, lr, lr / 10, lr / 10])
    assert of(second, "lr") == pytest.approx([lr, lr, lr, lr / 10])  # before each change
    names = {f"env{env}_{kind}_acc" for env in range(3) for kind in ("in", "out")}
    assert names <= first[0].keys()
    assert {key for key in second[0] if key.endswith("_acc") and "_g" not in key and "adj" not in key} == {
        f"fd_env{env}_in_acc" for env in range(3)
    }
    assert [record["epoch"] for record in second] == [0, 0.5, 1, 1.5]  # all 16 images of an environment
    assert first[0]["args"] == second[0]["args"] | {"holdout_fraction": 0.2}
    assert second[0]["args"]["steps"] == 12
    assert first[0]["loss"] != second[0]["loss"]


def test_what_it_leaves_behind(tmp_path: Path) -> None:
    main(tmp_path, "--save_model_every_checkpoint")
    names = {f"model_step{step}.pkl" for step in (0, 2, 4, 6)} | {"model.pkl"}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == names | {"done", "err.txt", "lock", "out.txt", "results.jsonl"}
    saved = torch.load(tmp_path / "model.pkl", weights_only=True)
    assert saved["args"]["holdout_fraction"] == 0
    assert saved["step"] == 6
    assert "second stage: 7 updates on all images" in (tmp_path / "out.txt").read_text()


def test_validation_is_the_training_environments_out_splits(tmp_path: Path, stepped: type[Stepped]) -> None:
    main(tmp_path, "--test_envs", "1")
    assert stepped.seen == [[(1, [3]), (1, [3])]] * 5


def test_validation_is_the_official_one_where_there_is_one(tmp_path: Path, stepped: type[Stepped]) -> None:
    main(tmp_path, "--dataset", "DigitsSubpop", "--eval_splits", "selection", "--checkpoint_freq", "3")
    assert stepped.seen == [[(7, [64] * 6 + [16])]] * 5
    first, second = stages(tmp_path)
    assert of(first, "loss") == of(second, "loss")  # the same images, weights and rates
    assert "fd_env3_in_wga" in second[0]


def test_a_schedule_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stepped, "CHANGES", (3, 99))
    main(tmp_path)
    first, second = stages(tmp_path)
    assert of(first, "step") == of(second, "step") == [0, 2, 4, 6, 8, 10, 11]
    assert of(second, "lr")[-1] == pytest.approx(of(first, "lr")[-1])


def test_unlabelled_images(tmp_path: Path) -> None:
    main(tmp_path, "--task", "domain_adaptation", "--uda_holdout_fraction", "0.5")
    first, second = stages(tmp_path)
    assert "env0_uda_acc" in first[0]
    assert {"fd_env0_in_acc", "fd_env0_uda_acc"} <= second[0].keys()


def test_two_test_environments_and_their_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for env in range(2):
        words = ["--test_envs", str(env), "--seed", str(env)]
        assert main(tmp_path / f"run{env}", *words, algorithm="ERMPlusPlus", linear_steps=2) == 0
    first, second = stages(tmp_path / "run0")
    assert of(first, "step") == of(second, "step") == [0, 2, 4, 6, 8, 10, 11]
    capsys.readouterr()
    collect_results.main(["--input_dir", str(tmp_path), "--auto_lr"])
    printed = capsys.readouterr().out
    best = max(range(len(first)), key=lambda i: np.mean([first[i][f"env{env}_out_acc"] for env in (1, 2)]))
    cell = f"{100 * second[best]['fd_env0_in_acc']:.1f} +/- 0.0"
    assert f"ERMPlusPlus           {cell}" in printed
    assert "auto lr training-domain validation set" in printed
    groups = (tmp_path / "groups.txt").read_text("utf-8")
    assert "ERMPlusPlus" in groups


def test_tables_of_groups_show_the_second_stage(tmp_path: Path) -> None:
    main(tmp_path / "run")
    first, second = stages(tmp_path / "run")
    (merged, *_) = collect_results.Merged(collect_results.merge_records([*first, *second]), []).grouped
    assert merged["env0_in_acc"] == second[0]["fd_env0_in_acc"]
    assert merged["env0_in_g0_n"] + merged["env0_in_g3_n"] <= 16
    assert {k: v for k, v in merged.items() if k.startswith("env1")} == {
        k: v for k, v in first[0].items() if k.startswith("env1")
    }
    alone = collect_results.Merged(collect_results.merge_records(first), [])
    assert (len(alone.grouped), alone.total) == (0, 4)


# The first stage makes 9 updates, 7 of which the second repeats; after the ninth, nothing more is saved of the first.
@pytest.mark.parametrize(("update", "resumed"), [(3, "4 of 24"), (8, "8 of 14"), (9, "8 of 14"), (13, "12 of 14")])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, update: int, resumed: str
) -> None:
    calls = []

    def update_and_be_told_to_end(self: Stepped, *args: Any) -> Any:
        calls.append(None)
        if len(calls) == update + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return ERM.update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stepped, "update", update_and_be_told_to_end)
        assert main(tmp_path / "cut", "--save_every_s", "0") == interruption.EXIT_PREEMPTED
    assert not (tmp_path / "cut" / "done").exists()
    assert not (tmp_path / "cut" / "model.pkl").exists()
    assert main(tmp_path / "cut") == 0
    assert f"resumed after {resumed} updates" in capsys.readouterr().out
    assert main(tmp_path / "whole") == 0
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    one, other = (
        torch.load(tmp_path / name / "model.pkl", weights_only=True)["model_dict"] for name in ("cut", "whole")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def comparable(directory: Path) -> list[dict[str, Any]]:
    first, second = stages(directory)
    for record in (*first, *second):
        record["args"].pop("output_dir")
    return [{k: v for k, v in record.items() if k not in ("step_time", "mem_gb")} for record in (*first, *second)]


def test_running_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(tmp_path)
    assert main(tmp_path, "--auto_lr") == 0
    assert "already done" in capsys.readouterr().out
    with pytest.raises(BadInput, match="auto_lr: False there, None now"):
        train.main([*QUICK, "--hparams", json.dumps(HPARAMS), "--output_dir", str(tmp_path), "--algorithm", "Stepped"])


@pytest.mark.parametrize(
    ("flags", "algorithm", "hparams", "message"),
    [
        ([], "ERM", {}, r"ERM has no method set_lr.*take an algorithm with one \(ERMPlusPlus.*\), or train"),
        (["--keep_best", "aa_wga"], "Stepped", {}, "--keep_best: train_autolr itself decides"),
        ([], "Stepped", {"patience": 3}, "hparam patience: train_autolr itself decides"),
        (["--holdout_fraction", "0"], "Stepped", {}, "needs validation images; give a --holdout_fraction above 0"),
    ],
)
def test_what_it_refuses(
    tmp_path: Path, flags: list[str], algorithm: str, hparams: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        main(tmp_path, *flags, algorithm=algorithm, **hparams)
    assert not (tmp_path / "results.jsonl").exists()


def test_as_a_command(tmp_path: Path) -> None:
    words = [*QUICK, "--algorithm", "ERM", "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "domainbed.scripts.train_autolr", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ERM has no method set_lr")


class TestEachOnce:
    @staticmethod
    def loader(kind: type[TrainingLoader], batch_size: int, **options: Any) -> TrainingLoader:
        torch.manual_seed(0)
        dataset = datasets.get_dataset_class("Debug28")(None, [0], {})
        splits = training_splits(dataset, split_environments(dataset, [0], 0.2), [0])
        return kind(splits, partitions.REGISTRY["environment"], batch_size, 2, **options)

    @pytest.mark.parametrize("batch_size", [4, 5, 30])
    def test_every_image_comes_before_any_comes_again(self, batch_size: int) -> None:
        loader = self.loader(train_autolr.EachOnce, batch_size)
        steps = [loader.draw(step).reshape(2, batch_size) for step in range(13)]
        for p, part in enumerate(loader.parts):
            rows = np.concatenate([step[p] for step in steps])
            passes = [rows[first : first + 13] for first in range(0, len(rows), 13)]
            assert all(sorted(some) == sorted(part.positions) for some in passes)
            assert len(passes) == batch_size
            assert any(list(passes[0]) != list(some) for some in passes[1:])

    def test_a_step_does_not_depend_on_those_before(self) -> None:
        one, other = (self.loader(train_autolr.EachOnce, 5) for _ in range(2))
        before = [one.draw(step) for step in range(9)]
        assert np.array_equal(other.draw(8), before[8])
        (minibatches,) = islice(other.start_at(8), 1)
        assert [len(y) for _, y in minibatches] == [5, 5]

    def test_balanced_classes_are_drawn_as_ever(self) -> None:
        one, other = (self.loader(kind, 5, class_balanced=True) for kind in (train_autolr.EachOnce, TrainingLoader))
        assert np.array_equal(one.draw(3), other.draw(3))


def test_the_second_stage_is_no_row_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    main(tmp_path / "run")
    capsys.readouterr()
    chosen = ["--dataset", "Debug28", "--algorithm", "Stepped", "--test_env", "0"]
    assert list_top_hparams.main(["--input_dir", str(tmp_path), *chosen]) == 0
    assert "row:" not in capsys.readouterr().out
    assert collect_results.main(["--input_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Total records: 4" in printed
    assert "holdout" not in printed
    assert not caplog.records


def test_explanations_are_those_of_the_joined_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main(tmp_path / "run", "--dataset", "ColoredDigits", "--explain", "4", "--steps", "8")
    collect_results.main(["--input_dir", str(tmp_path), "--auto_lr"])
    assert (tmp_path / "explanations.txt").exists()
    assert "no recorded step" not in caplog.text


@pytest.mark.parametrize("freq", ["1", "2"])
def test_a_search_that_ends_where_it_begins_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freq: str
) -> None:
    monkeypatch.setattr(Stepped, "CHANGES", (0, 0))
    with pytest.raises(BadInput, match="ended its search at the first checkpoint"):
        main(tmp_path, "--checkpoint_freq", freq)
    assert not (tmp_path / "done").exists()


def test_a_fraction_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="fractions below 1"):
        main(tmp_path, "--uda_holdout_fraction", "nan")
