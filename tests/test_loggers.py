import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from domainbed import algorithms, loggers, snapshots
from domainbed.loggers import REGISTRY, LoggedRun, Tracker, check, logging_to, scalars
from domainbed.scripts import BadInput, sweep, train
from domainbed.scripts.sweep_arguments import parse
from domainbed.scripts.sweep_jobs import sweep_jobs

FLAGS = [
    "--dataset", "Debug28", "--algorithm", "GroupDRO", "--steps", "8", "--checkpoint_freq", "2", "--skip_model_save",
    "--hparams", '{"backbone": "small_cnn", "batch_size": 4}',
]  # fmt: skip
RECORD = {
    "step": 3, "epoch": 1.5, "loss": 0.25, "mem_gb": 0.0, "env0_in_acc": 0.5, "env0_in_wga": 0, "env1_out_adj_acc": 0.7,
    "env0_in_g2_acc": 0.5, "env0_in_g2_n": 8, "env0_in_wga_g": 2, "env0_in_wga_n": 8, "env0_in_group_mean_acc": 0.6,
    "train_g2_n": 5, "args": {"seed": 1}, "hparams": {"lr": 0.1},
}  # fmt: skip
ARGS = {"algorithm": "ERM", "dataset": "Cats", "trial_seed": 2, "test_envs": [0], "steps": None, "output_dir": "out"}
Logged = list[tuple[int, float]]


class Kept(Tracker):
    """What trackers of the tests were told."""

    runs: list["Kept"] = []

    def __init__(self, run: LoggedRun):
        self.run, self.logged, self.ends = run, [], []
        Kept.runs.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append((step, dict(values)))

    def close(self, finished: bool) -> None:
        self.ends.append(finished)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Kept]:
    """A tracker of the name ``kept``, and what its makings were told, one for each start of a run."""
    monkeypatch.setitem(REGISTRY, "kept", Kept)
    monkeypatch.setattr(Kept, "runs", [])
    return Kept.runs


def results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def losses(directory: Path) -> Logged:
    return [(record["step"], record["loss"]) for record in results(directory)]


def main(directory: Path, *flags: str) -> int:
    return train.main([*FLAGS, *flags, "--output_dir", str(directory)])


def interrupted(directory: Path, *flags: str) -> None:
    """A run that fails after step 6 while its last snapshot is of step 2, and that goes on from there.

    So the records of steps 4 and 6 are logged, cut off, and made again.
    """
    group_dro, write, updates = algorithms.get_algorithm_class("GroupDRO"), snapshots.write, []
    update = group_dro.update

    def fails(*given: Any) -> Any:
        updates.append(1)
        if len(updates) == 8:
            raise RuntimeError("a cosmic ray")
        return update(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_dro, "update", fails)
        patch.setattr(snapshots, "write", lambda *given: write(*given) if len(updates) == 3 else None)
        with pytest.raises(RuntimeError, match="cosmic"):
            main(directory, "--save_every_s", "0", *flags)
    assert [step for step, _ in losses(directory)] == [0, 2, 4, 6]
    assert main(directory, *flags) == 0
    assert [step for step, _ in losses(directory)] == [0, 2, 4, 6, 7]


def test_scalars_are_the_numbers_under_their_keys_by_section() -> None:
    assert scalars(RECORD) == {
        "training/epoch": 1.5,
        "training/loss": 0.25,
        "training/mem_gb": 0.0,
        "accuracy/env0_in_acc": 0.5,
        "accuracy/env0_in_wga": 0.0,
        "accuracy/env1_out_adj_acc": 0.7,
        "groups/env0_in_g2_acc": 0.5,
        "groups/env0_in_group_mean_acc": 0.6,
    }


def test_what_a_tracker_is_told_of_a_run(tmp_path: Path) -> None:
    run = LoggedRun(tmp_path, ARGS, {"lr": 0.1, "vit": False})
    assert run.name == "ERM Cats 2"
    assert LoggedRun(tmp_path, ARGS | {"label": "Mine"}, {}).name == "Mine Cats 2"
    assert run.settings["args/test_envs"] == "[0]"
    assert run.settings["args/steps"] == "null"
    assert run.settings["hparams/lr"] == 0.1
    assert run.settings["hparams/vit"] is False
    assert run.id == LoggedRun(tmp_path, {**ARGS, "output_dir": "./out"}, {}, first_step=5).id
    others = [LoggedRun(tmp_path, ARGS | {"steps": 3}, {}).id, LoggedRun(tmp_path / "other", ARGS, {}).id]
    assert len({run.id, *others}) == 3


def test_a_run_tells_its_tracker_what_it_writes(tmp_path: Path, kept: list[Kept]) -> None:
    assert main(tmp_path, "--log_to", "kept") == 0
    (tracker,) = kept
    assert tracker.logged == [(record["step"], scalars(record)) for record in results(tmp_path)]
    assert tracker.ends == [True]
    assert tracker.run.first_step == 0
    assert all("log_to" not in record["args"] for record in results(tmp_path))
    assert main(tmp_path) == 0  # already done: it is no other run without trackers
    assert len(kept) == 1


def test_a_run_that_goes_on_names_its_first_step(tmp_path: Path, kept: list[Kept]) -> None:
    interrupted(tmp_path, "--log_to", "kept")
    first, second = kept
    assert first.ends == [False]
    assert first.run.id == second.run.id
    assert [step for step, _ in first.logged] == [0, 2, 4, 6]
    assert second.run.first_step == 3
    assert [step for step, _ in second.logged] == [4, 6, 7]


def events(directory: Path) -> Any:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(directory / "tensorboard"), {accumulators.SCALARS: 0})
    return found.Reload()


def test_tensorboard_shows_each_step_once_with_the_numbers_that_hold(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    interrupted(tmp_path, "--log_to", "tensorboard")
    read = events(tmp_path)
    assert set(read.Tags()["scalars"]) == {tag for record in results(tmp_path) for tag in scalars(record)}
    for section, key in (("training", "loss"), ("training", "step_time"), ("accuracy", "env0_in_acc")):
        shown = [(event.step, event.value) for event in read.Scalars(f"{section}/{key}")]
        assert shown == [(record["step"], pytest.approx(record[key])) for record in results(tmp_path)]
    assert read.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"


def test_a_run_that_replaces_another_takes_its_events_away(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main(tmp_path, "--steps", "1", "--log_to", "tensorboard") == 0
    old = set((tmp_path / "tensorboard").iterdir())
    assert main(tmp_path, "--overwrite", "--steps", "2", "--log_to", "tensorboard") == 0
    new = set((tmp_path / "tensorboard").iterdir())
    assert len(old) == len(new) == 1
    assert not old & new
    assert [event.step for event in events(tmp_path).Scalars("training/loss")] == [0, 1]


class Wandb:
    """A stand-in for the module; like W&B, it takes no step twice."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []
        self.history: dict[str, dict[int, dict[str, float]]] = {}
        self.exits: list[int] = []

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **given: Any) -> Any:
        self.given.append(given)
        history = self.history.setdefault(given["id"], {})
        if given["resume"] is None:
            history.clear()
        starting_step = max(history, default=-1) + 1

        def log(values: dict[str, float], step: int) -> None:
            assert step not in history
            history[step] = values

        return SimpleNamespace(
            log=log, starting_step=starting_step, finish=lambda exit_code: self.exits.append(exit_code)
        )


def test_a_run_of_wandb_goes_on_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(loggers, "check", lambda _: None)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    interrupted(tmp_path, "--log_to", "wandb")
    assert [given["resume"] for given in wandb.given] == [None, "allow"]
    assert {given["project"] for given in wandb.given} == {"mine"}
    assert wandb.given[0]["config"]["hparams"]["batch_size"] == 4
    (history,) = wandb.history.values()
    assert [(step, values["training/loss"]) for step, values in history.items()] == losses(tmp_path)
    assert wandb.exits == [1, 0]


class MlflowServer:
    """A stand-in for ``mlflow``, its client and its entities; like MLflow, it keeps all numbers of a step."""

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.experiments: dict[str, str] = {}
        self.MlflowClient = lambda: self
        self.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
        self.Param = lambda key, value: (key, value)

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = f"#{len(self.experiments)}"
        return self.experiments[name]

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[Any]:
        return [run for run in self.runs.values() if query == f"tags.domainbed_run = '{run.tags['domainbed_run']}'"]

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        name = str(len(self.runs))
        self.runs[name] = SimpleNamespace(
            info=SimpleNamespace(run_id=name), tags=tags, name=run_name, metrics=[], params=[], states=[]
        )
        return self.runs[name]

    def update_run(self, name: str, status: str) -> None:
        self.runs[name].states.append(status)

    set_terminated = update_run

    def get_metric_history(self, name: str, key: str) -> list[Any]:
        return [metric for metric in self.runs[name].metrics if metric.key == key]

    def log_batch(self, name: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 5
        assert len(params) <= 5
        self.runs[name].metrics += metrics
        self.runs[name].params += params


def test_a_run_of_mlflow_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = MlflowServer()
    monkeypatch.setitem(sys.modules, "mlflow", server)
    monkeypatch.setitem(sys.modules, "mlflow.entities", server)
    monkeypatch.setattr(loggers, "check", lambda _: None)
    for limit in ("MOST_METRICS", "MOST_PARAMS"):
        monkeypatch.setattr(loggers.MLflow, limit, 5)
    monkeypatch.setattr(loggers.MLflow, "PATIENCE", {})
    interrupted(tmp_path, "--log_to", "mlflow")
    (run,) = server.runs.values()
    shown = [(metric.step, metric.value) for metric in run.metrics if metric.key == "training/loss"]
    assert shown == losses(tmp_path)
    assert {metric.key for metric in run.metrics} == set(scalars(results(tmp_path)[0]))
    assert dict(run.params)["hparams/batch_size"] == "4"
    assert run.states == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert (
        main(tmp_path, "--steps", "1", "--overwrite", "--log_to", "mlflow") == 0
    )  # a run that starts over is another one
    assert len(server.runs) == 2


@pytest.mark.parametrize(
    ("where", "error", "cause"),
    [
        ("__init__", OSError(28, "No space left\non device"), "OSError: [Errno 28] No space left on device"),
        ("log", OSError(28, "No space left\non device"), "OSError: [Errno 28] No space left on device"),
        ("close", ValueError("closed"), "ValueError: closed"),
        ("log", SystemExit("no key"), "SystemExit: no key"),
    ],
)
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, error: BaseException,
    cause: str,
) -> None:  # fmt: skip
    calls: list[int] = []

    def fails(*_: Any) -> None:
        calls.append(1)
        raise error

    class Broken(Kept):
        pass

    setattr(Broken, where, fails)
    monkeypatch.setitem(REGISTRY, "broken", Broken)
    assert main(tmp_path, "--steps", "2", "--log_to", "broken", "kept") == 0
    warnings = [record.getMessage() for record in caplog.records if record.name == "domainbed.loggers"]
    assert warnings == [f"no more is logged to broken, the training goes on: {cause}"]
    assert calls == [1]
    assert [step for step, _ in losses(tmp_path)] == [0, 1]
    assert (tmp_path / "done").exists()
    (other,) = (tracker for tracker in Kept.runs if type(tracker) is Kept)
    assert len(other.logged) == 2


def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    class Hanging(Kept):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            released.wait(60)

    monkeypatch.setitem(REGISTRY, "hanging", Hanging)
    monkeypatch.setattr(loggers, "CLOSE_S", 0.01)
    with logging_to(["hanging"], LoggedRun(tmp_path, ARGS, {})) as trackers:
        for _ in range(100):
            trackers.log(RECORD)
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "log to hanging")
    assert "hanging has not taken everything within 0.01 s" in caplog.text
    assert thread.daemon  # the process ends all the same
    released.set()
    thread.join()


def test_a_tracker_that_can_t_be_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--log_to not found: tensorbord; did you mean tensorboard"):
        main(tmp_path, "--log_to", "tensorbord")
    monkeypatch.setattr(loggers.WeightsAndBiases, "PACKAGE", "no_such_package")
    with pytest.raises(BadInput, match=r"pip install 'domainbed-ex2l\[wandb\]'"):
        main(tmp_path, "--log_to", "wandb")
    assert not (tmp_path / "results.jsonl").exists()
    check(["kept"])


def test_a_sweep_hands_trackers_on_to_the_same_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["launch", "--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--n_trials", "1"]
    words += ["--single_test_envs", "--command_launcher", "dummy", "--output_dir", str(tmp_path)]
    plain = sweep_jobs(parse(words))
    logged = sweep_jobs(parse([*words, "--log_to", "kept", "tensorboard", "--save_every_s", "5"]))
    assert [job.output_dir for job in logged] == [job.output_dir for job in plain]
    assert [job.command_str for job in logged] == [
        f"{job.command_str} --save_every_s 5 --log_to kept tensorboard" for job in plain
    ]
    for again in (["worker"], ["retry_failed", "--command_launcher", "dummy"]):
        with pytest.raises(BadInput, match="--log_to not found: wandbb; did you mean wandb"):
            sweep.main([*again, "--output_dir", str(tmp_path), "--log_to", "wandbb"])
    monkeypatch.setenv("DOMAINBED_PLUGINS", "mine.py")  # what jobs import may add a tracker
    assert sweep_jobs(parse([*words, "--log_to", "wandbb"]))[0].command_str.endswith("--log_to wandbb")
