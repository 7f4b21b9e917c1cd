"""Experiment trackers, fed from the same records as results.jsonl, which stays the truth: TensorBoard, W&B, MLflow.

A tracker works in a thread of its own, so that one that hangs or fails costs the run its pictures and nothing else.
"""

import hashlib
import importlib.util
import json
import logging
import os
import queue
import re
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from domainbed import records
from domainbed.messages import not_found

logger = logging.getLogger(__name__)

TENSORBOARD_DIRECTORY = "tensorboard"
PROJECT = "domainbed"  # where W&B and MLflow keep the runs, unless their own environment variables name another place
CLOSE_S = 60.0  # what a tracker gets in the end to send what it still has
CONNECT_S = 30


@dataclass(frozen=True)
class LoggedRun:
    """What a tracker is told of a run.

    Attributes:
        directory: the run's.
        args, hparams: as in its records.
        first_step: no step before it will be logged; above 0 where the run goes on from a snapshot.
    """

    directory: Path
    args: Mapping[str, Any]
    hparams: Mapping[str, Any]
    first_step: int = 0

    @property
    def id(self) -> str:
        """The same whenever this run goes on; another for other arguments or another directory."""
        args = {key: value for key, value in self.args.items() if key != "output_dir"}
        return hashlib.md5(f"{os.path.abspath(self.directory)} {records.dumps(args)}".encode()).hexdigest()

    @property
    def name(self) -> str:
        """For people: the row's label or algorithm, the dataset, the trial."""
        return f"{self.args.get('label') or self.args['algorithm']} {self.args['dataset']} {self.args['trial_seed']}"

    @property
    def settings(self) -> dict[str, Any]:
        """``hparams/lr``, ``args/steps`` ...: numbers and strings as they are, anything else as JSON."""
        both = {"args": self.args, "hparams": self.hparams}
        found = {f"{kind}/{key}": value for kind, values in both.items() for key, value in sorted(values.items())}
        return {k: v if isinstance(v, str | int | float) else json.dumps(v, sort_keys=True) for k, v in found.items()}


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's numbers under their keys, in the sections accuracy/, groups/ and training/; no step, no counts."""
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step" and not _is_count(k)}
    return {f"{_section(key)}/{key}": float(value) for key, value in numbers.items()}


def _is_count(key: str) -> bool:
    return records.is_group_key(key) and key.endswith(("_n", "_wga_g"))


def _section(key: str) -> str:
    if records.is_group_key(key):
        return "groups"
    return "accuracy" if re.match(r"(fd_)?env\d+_", key) else "training"


class Tracker(ABC):
    """Where a run's numbers are sent; made anew each time that the run starts or goes on.

    Attributes:
        PACKAGE: the module that it imports; empty: none.
        INSTALL: what ``pip install`` is told for it.
    """

    PACKAGE: ClassVar[str] = ""
    INSTALL: ClassVar[str] = ""

    @abstractmethod
    def __init__(self, run: LoggedRun): ...

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes what ``scalars`` gives; a step that it has from before the run went on is left as it is or replaced."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """The process ends; ``finished``: so does the training, else it failed or goes on later."""


class TensorBoard(Tracker):
    """An event file in the run's directory; the steps that the run does again are marked as void in those before."""

    PACKAGE, INSTALL = "tensorboard", "domainbed-ex2l[tensorboard]"

    def __init__(self, run: LoggedRun):
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory = run.directory / TENSORBOARD_DIRECTORY
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self.writer = RecordWriter(open(directory / name, "xb"))  # noqa: SIM115 - closed by the writer
        self._write(file_version="brain.Event:2")
        self._write(step=run.first_step, session_log={"status": "START"})
        self._write(summary=hparams_pb(run.settings))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.writer.write(Event(wall_time=time.time(), **content).SerializeToString())
        self.writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        summary = {"value": [{"tag": tag, "simple_value": value} for tag, value in values.items()]}
        self._write(step=step, summary=summary)

    def close(self, finished: bool) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of W&B, which keeps its files in the run's directory; WANDB_MODE, WANDB_PROJECT ... hold as always.

    W&B takes no step twice, so those that it has when the run goes on keep the numbers that they had.
    """

    PACKAGE, INSTALL = "wandb", "domainbed-ex2l[wandb]"

    def __init__(self, run: LoggedRun):
        import wandb

        self.run = wandb.init(
            id=run.id,
            resume="allow" if run.first_step else None,  # None: a run that starts over replaces what was there
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=str(run.args["dataset"]),
            name=run.name,
            dir=str(run.directory),
            config={"args": dict(run.args), "hparams": dict(run.hparams)},
            settings=wandb.Settings(console="off", init_timeout=CONNECT_S, login_timeout=CONNECT_S),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self.run.starting_step:
            self.run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow(Tracker):
    """A run of MLflow, found again by a tag; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ... hold as always.

    MLflow would show both numbers of a step that is logged twice, so what it has when the run goes on stays alone.
    """

    PACKAGE, INSTALL = "mlflow", "domainbed-ex2l[mlflow]"
    TAG = "domainbed_run"
    MOST_METRICS, MOST_PARAMS, LONGEST = 1000, 100, 500  # of one request; characters of a parameter
    PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CONNECT_S)}

    def __init__(self, run: LoggedRun):
        for name, value in self.PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.client = MlflowClient()
        self.id: str = (run.first_step and self._found(run)) or self._created(run)
        self.client.update_run(self.id, status="RUNNING")
        self.logged = {metric.step for metric in self.client.get_metric_history(self.id, "training/epoch")}

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        try:
            return str(found.experiment_id if found else self.client.create_experiment(name))
        except Exception:  # another job of the sweep may have made it meanwhile
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def _found(self, run: LoggedRun) -> str | None:
        runs = self.client.search_runs([self._experiment()], f"tags.{self.TAG} = '{run.id}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _created(self, run: LoggedRun) -> str:
        from mlflow.entities import Param

        made = self.client.create_run(self._experiment(), tags={self.TAG: run.id}, run_name=run.name)
        params = [Param(key, str(value)[: self.LONGEST]) for key, value in run.settings.items()]
        for start in range(0, len(params), self.MOST_PARAMS):
            self.client.log_batch(made.info.run_id, params=params[start : start + self.MOST_PARAMS])
        return str(made.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if step in self.logged:
            return
        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        for start in range(0, len(metrics), self.MOST_METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + self.MOST_METRICS])

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


# name on the command line -> class; a plugin ($DOMAINBED_PLUGINS) may add its own
REGISTRY: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def check(names: Iterable[str]) -> None:
    """Makes sure that the trackers of these names can be opened, without importing their packages.

    Raises:
        NotImplementedError: no such tracker.
        ImportError: its package is not installed.
    """
    for name in names:
        if name not in REGISTRY:
            raise NotImplementedError(not_found("--log_to", name, list(REGISTRY)))
        package = REGISTRY[name].PACKAGE
        if package and importlib.util.find_spec(package) is None:
            raise ImportError(f"--log_to {name} needs the package {package}: pip install '{REGISTRY[name].INSTALL}'")


def clear(directory: str | os.PathLike[str]) -> None:
    """Removes the TensorBoard events of the run that was in the directory."""
    for path in Path(directory, TENSORBOARD_DIRECTORY).glob("events.out.tfevents.*"):
        path.unlink()


class _Line:
    """A tracker at work in its thread; its first failure is a warning, and its last act."""

    def __init__(self, name: str, run: LoggedRun):
        self.name, self.calls = name, queue.SimpleQueue[Callable[[Tracker], None] | None]()
        self.thread = threading.Thread(target=self._work, args=[run], daemon=True, name=f"log to {name}")
        self.thread.start()

    def _work(self, run: LoggedRun) -> None:
        try:
            tracker = REGISTRY[self.name](run)
            while (call := self.calls.get()) is not None:
                call(tracker)
        except (Exception, SystemExit) as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.warning("no more is logged to %s, the training goes on: %s", self.name, cause)

    def close(self, finished: bool) -> None:
        self.calls.put(lambda tracker: tracker.close(finished))
        self.calls.put(None)


class Logging:
    """The trackers of a run under way, each in its own thread."""

    def __init__(self, names: Iterable[str], run: LoggedRun):
        self._lines = [_Line(name, run) for name in dict.fromkeys(names)]

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands a record on, and returns at once."""
        step, values = int(record["step"]), scalars(record)
        for line in self._lines:
            line.calls.put(lambda tracker: tracker.log(step, values))

    def close(self, finished: bool) -> None:
        """Waits until all is sent, for CLOSE_S seconds at most."""
        for line in self._lines:
            line.close(finished)
        end = time.monotonic() + CLOSE_S
        for line in self._lines:
            line.thread.join(max(0.0, end - time.monotonic()))
            if line.thread.is_alive():
                logger.warning("%s has not taken everything within %g s; it is left behind", line.name, CLOSE_S)


@contextmanager
def logging_to(names: Iterable[str], run: LoggedRun) -> Iterator[Logging]:
    """The trackers of these names, until the body ends."""
    trackers, finished = Logging(names, run), False
    try:
        yield trackers
        finished = True
    finally:
        trackers.close(finished)
