"""What a notebook needs: train, load runs into a DataFrame, select, predict and explain; docs/api.md shows each.

``import domainbed.api as db`` is light: torch, pandas and Matplotlib are loaded where they are first used.
"""

import logging
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from domainbed import model_selection, records, rows, states
from domainbed.commands import program, train_command
from domainbed.interruption import EXIT_PREEMPTED
from domainbed.messages import not_found

if TYPE_CHECKING:
    import pandas
    import torch

    from domainbed.predictors import Predictor

__all__ = ["Run", "TrainingFailed", "load", "load_runs", "select", "train"]

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Place = str | os.PathLike[str]

LAST_LINES = 20  # of a failed training's output, in its error
EVERY = ("record", "run")
CRITERIA = (*model_selection.CRITERIA, "accuracy", "oracle")
_RUN_HEADER = re.compile(r"\t|Environment:$|Args:$|HParams:$")
_TABLE_ROW = re.compile(r"-?\d|nan|-?inf")


class TrainingFailed(RuntimeError):
    """A training ended otherwise than by being done; the message ends with the last lines that it wrote."""


@dataclass(frozen=True)
class Run:
    """A run's directory.

    Attributes:
        directory: train's ``output_dir``.
    """

    directory: Path

    @property
    def args(self) -> dict[str, Any]:
        """The arguments it was trained with.

        Raises:
            FileNotFoundError: it has no records.
        """
        found: dict[str, Any] = next(iter(_found(self.directory))).record["args"]
        return found

    @property
    def records(self) -> "pandas.DataFrame":
        """A line for each of its records, as ``load_runs`` gives them."""
        return load_runs(self.directory)

    def predictor(self) -> "Predictor":
        """Its model, as ``load`` gives it."""
        return load(self.directory)


def train(algorithm: str, dataset: str, output_dir: Place, *, progress: bool = True, **flags: Any) -> Run:
    """Trains in a process of its own, by the command line that does the same: same files, seeds and numbers.

    An unfinished run goes on, one that is done is left alone. Interrupted, the training saves itself and ends; the
    same call goes on from there.

    Args:
        algorithm: its name; a class of one's own is registered in a file named in ``$DOMAINBED_PLUGINS``.
        progress: print a line for each record.
        flags: those of ``domainbed.scripts.train`` without their dashes: ``steps=300``, ``test_envs=[0]``,
            ``overwrite=True``, ``hparams={"lr": 0.001}``.

    Raises:
        TypeError: no such flag.
        ValueError: a flag's list is empty.
        TrainingFailed: it did not end well.
    """
    args = _train_args({"algorithm": algorithm, "dataset": dataset, "output_dir": os.fspath(output_dir), **flags})
    run = Run(Path(output_dir))
    process = subprocess.Popen(
        program(train_command(args).argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches us alone, who ask it to save and end
    )
    try:
        last = _follow(process, run.directory, print if progress else logger.info)
        code = process.wait()
    finally:
        _end(process)
    if code:
        raise TrainingFailed(f"training ended with {_ending(code)}; its last lines:\n" + "\n".join(last))
    return run


def _train_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the command line takes them; what is None, False or an empty list by default is left out.

    Raises:
        TypeError: no such flag.
        ValueError: another empty list.
    """
    from domainbed.scripts.train_arguments import parser

    known = {action.dest: action.default for action in parser()._actions if action.dest != "help"}
    for name in given:
        if name not in known:
            raise TypeError(not_found("flag of train", name, list(known)))
    if not isinstance(given["algorithm"], str) or not isinstance(given["dataset"], str):
        raise TypeError("algorithm and dataset are names; $DOMAINBED_PLUGINS names the files of classes of your own")
    plain = {name: _plain(value) for name, value in given.items()}
    for name, value in plain.items():
        if value == [] and known[name] != []:
            raise ValueError(f"{name}=[] is empty; give one value or more, or leave it out for the default")
    return {name: value for name, value in plain.items() if value is not None and value is not False and value != []}


def _plain(value: Any) -> Any:
    """Dicts as JSON, NumPy's numbers and arrays as Python's, tuples as lists."""
    if isinstance(value, dict):
        return records.dumps(value)
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return list(value) if isinstance(value, tuple) else value


def _follow(process: "subprocess.Popen[str]", directory: Path, say: Callable[[str], object]) -> Sequence[str]:
    """Says how the training goes until it ends; returns the last lines of its output."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    said, held = -1, ""
    assert process.stdout is not None
    for line in map(str.rstrip, process.stdout):
        last.append(line)
        if _TABLE_ROW.match(line):  # of a record that was written just before; the line above it was the table's head
            held, record = "", _last_record(directory)
            if record and record["step"] != said:
                said = record["step"]
                say(_summary(record))
            continue
        if held:
            say(held)
        held = "" if _RUN_HEADER.match(line) else line
    if held:
        say(held)
    return list(last)


def _last_record(directory: Path) -> Record | None:
    path = directory / records.RESULTS_FILE
    found = records.read_checkpoints(path)[0] if path.exists() else []
    return found[-1] if found else None


def _summary(record: Record) -> str:
    """A line that says how the run stands."""
    shown = {name: f"{100 * value:.1f}" for name, value in _numbers(record).items() if value is not None}
    words = [f"{name.replace('_aa', ' AA').replace('_wga', ' WGA')} {text}" for name, text in shown.items()]
    return f"step {record['step']}: {', '.join(words)}"


def _end(process: "subprocess.Popen[str]") -> None:
    """Asks a training that still runs to save itself and end, and waits for it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate()  # reads on: a closed pipe would end it before it has saved


def _ending(code: int) -> str:
    if code == EXIT_PREEMPTED:
        return f"exit status {code}: it was asked to end; train it again, it goes on where it was"
    return f"exit status {code}" if code > 0 else f"signal {signal.Signals(-code).name}"


class _Found(NamedTuple):
    """A record, and the run's directory in which it lies."""

    directory: Path
    record: dict[str, Any]


def _found(directory: Place) -> Iterable[_Found]:
    """The records of a run, or of the runs directly under a sweep's directory.

    Raises:
        FileNotFoundError: there are none.
    """
    place = Path(directory)
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such directory; name a run's output_dir, or that of a sweep")
    one = place / records.RESULTS_FILE
    found = [one] if one.exists() else sorted(place.glob(f"*/{records.RESULTS_FILE}"))
    some = [_Found(path.parent, record) for path in found for record in _read(path)]
    if not some:
        raise FileNotFoundError(f"{place} holds no records (*/{records.RESULTS_FILE}); name an output_dir")
    return some


def _read(path: Path) -> list[dict[str, Any]]:
    found, skipped = records.read_checkpoints(path)
    if skipped:
        logger.warning("%s: skipped %d line(s) that hold no record", path, skipped)
    return found


def load_runs(directory: Place, every: str = "record") -> "pandas.DataFrame":
    """The records of a sweep, or of a run, as a table.

    Columns: the row's name as in tables, what the run is, AA and WGA (fractions) of validation and test as selection
    pools them, the run's state and directory, then all keys of the records, and hparams as ``hparams.NAME``. Where no
    groups are known, AA is the mean of the environments' accuracies and WGA is missing.

    Args:
        every: "record", or "run" for the last record of each.

    Raises:
        FileNotFoundError: there are no records.
        ValueError: ``every`` is something else.
    """
    import pandas

    if every not in EVERY:
        raise ValueError(f"every={every!r} is unknown; choose among {', '.join(EVERY)}")
    found = list(_found(directory))
    if every == "run":
        found = list({some.directory: some for some in sorted(found, key=lambda some: some.record["step"])}.values())
        found.sort(key=lambda some: str(some.directory))
    names = _row_names(some.record for some in found)
    state = {place: states.read(place).state.value for place in {some.directory for some in found}}
    lines = [
        {**_identity(record, names), **_numbers(record), "state": state[place], "directory": str(place)}
        | {key: value for key, value in record.items() if key not in ("args", "hparams", "step")}
        | {f"hparams.{name}": value for name, value in record.get("hparams", {}).items()}
        for place, record in found
    ]
    return pandas.DataFrame(lines)


def _row_names(some: Iterable[Record]) -> dict[rows.Row, str]:
    return rows.row_names(rows.meeting(rows.Run.of(record["args"]) for record in some).values())


def _identity(record: Record, names: Mapping[rows.Row, str]) -> dict[str, Any]:
    run = rows.Run.of(record["args"])
    named = {"row": names[run.row], "algorithm": run.row.algorithm, "partition": run.row.partition}
    seeds = {key: getattr(run, key) for key in ("trial_seed", "hparams_seed", "seed")}
    return {**named, "dataset": run.dataset, "test_envs": run.test_envs, **seeds, "step": record["step"]}


def _numbers(record: Record) -> dict[str, float | None]:
    """AA and WGA of validation and of test, fractions; None where the record does not have them."""
    tested = [(env, "in") for env in sorted(record["args"]["test_envs"])]
    places = {"validation": model_selection.validation_splits(record), "test": tested}
    found: dict[str, float | None] = {}
    for name, splits in places.items():
        aa, wga = records.granted(record, splits) or (_mean(record, splits), None)
        found |= {f"{name}_aa": aa, f"{name}_wga": wga}
    return found


def _mean(record: Record, splits: Sequence[tuple[int, str]]) -> float | None:
    values = [record[key] for key in (records.acc_key(*split) for split in splits) if key in record]
    return sum(values) / len(values) if values and len(values) == len(splits) else None


def select(directory: Place, criterion: str = "aa_wga") -> "pandas.DataFrame":
    """The checkpoints that a criterion chooses: one of each row, dataset, test environments and trial.

    They are those of which ``collect_results`` prints the means. Further seeds of one draw are trials of their own,
    told apart by ``replicate``.

    Args:
        criterion: "aa_wga" (AA + WGA) / 2, or "wga", on the pooled validation images (AA where the validation budget
            grants none of their confounders, and no validation_wga); "accuracy": the mean accuracy of
            the validation environments, whose numbers then are means over environments; "oracle": (AA + WGA) / 2 on
            the test images, a bound on what choosing can do and no method. Column ``selection`` says which.

    Raises:
        FileNotFoundError: there are no records.
        ValueError: no such criterion.
    """
    import pandas

    if criterion not in CRITERIA:
        raise ValueError(not_found("criterion", criterion, CRITERIA))
    found = list(_found(directory))
    places = {id(some.record): some.directory for some in found}  # choosing hands on the very records
    names = _row_names(some.record for some in found)
    lines = [
        {**_identity(choice.record, names), "replicate": choice.replicate, **_chosen_numbers(choice)}
        | {"selection": "oracle: sees the test images" if criterion == "oracle" else criterion, "score": choice.score}
        | {"directory": str(places[id(choice.record)])}
        for choice in _choices([some.record for some in found], criterion)
    ]
    order = ("dataset", "test_envs", "row", "trial_seed", "replicate")
    return pandas.DataFrame(sorted(lines, key=lambda line: [line[key] for key in order]))


def _choices(found: Sequence[Record], criterion: str) -> Sequence[model_selection.Checkpoint]:
    if criterion == "oracle":
        return model_selection.choose_oracle(found)
    if criterion == "accuracy":
        return model_selection.choose_by_accuracy(found)
    return model_selection.choose(found, criterion)


def _chosen_numbers(choice: model_selection.Checkpoint) -> dict[str, float | None]:
    found = _numbers(choice.record)
    if isinstance(choice, model_selection.AccuracyChoice):
        found |= {"validation_aa": choice.score, "test_aa": choice.mean}
    return found


def load(
    run: Place,
    device: "str | torch.device | None" = None,
    class_names: Sequence[str] = (),
    trusted: bool = False,
) -> "Predictor":
    """The model of a run: the best one if it was kept (``keep_best``), else the last; or a ``model*.pkl`` by its path.

    Args:
        run: its directory, or the file of a model, of DomainBed's too.
        device: default: a GPU if there is one.
        class_names: in place of the dataset's own.
        trusted: load the file whatever it holds; that may run code, which tensors and plain values, all that is loaded
            else, can't. It also lets a backbone fetch its code from the network, as DINOv2 does.

    Raises:
        FileNotFoundError: there is no such run or model.
        NotImplementedError: its algorithm is not known here.
        OSError: the file can't be read, or code can't be fetched.
        ValueError: the device can't be used here; or the file is no model, holds what only a trusted one may, or does
            not fit the class as it is now.
    """
    from domainbed import predictors

    return predictors.load(run, device, class_names, trusted)
