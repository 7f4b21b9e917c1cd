"""A sweep's directory -> what tables need of its runs, read quickly: an index beside the runs spares reading again.

The index is a SQLite file that is never changed in place: who collects writes a new one and puts it in the old one's
place. So collectors don't wait for each other, a kill leaves the old index, and no lock is needed where files are
shared between machines.
"""

import gc
import json
import logging
import os
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from domainbed import records as keys
from domainbed.condensing import Judged, Summary, Timing
from domainbed.lib.query import Q
from domainbed.model_selection import (
    Accs,
    IIDAccuracySelectionMethod,
    LeaveOneOutSelectionMethod,
    OracleSelectionMethod,
    SelectionMethod,
    chosen_acc,
    several_test_envs,
    warn_lacking,
)
from domainbed.rows import Row, Run
from domainbed.run_index.database import INDEX_FILE, Damaged, Index, Kept
from domainbed.run_index.reading import Collector, Files

JUDGED: dict[type[SelectionMethod], str] = {IIDAccuracySelectionMethod: "iid", OracleSelectionMethod: "oracle"}
TEMPORARY = ".tmp"
LEFTOVER_S = 86_400  # no collector takes that long

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A segment of a results file: the name of its run's directory, its number in the file, its summary."""

    name: str
    number: int
    summary: Summary


class Collected:
    """What a sweep's directory holds.

    Attributes:
        directory: of the sweep.
        runs: each run's parts (one, unless a run's records are spread over several files), in name order.
        total: number of records in the files.
        skipped: number of lines that hold no record, by file.
        explanations: the lines of the runs' explanations.
    """

    def __init__(self, collector: Collector, index: Index):
        self.directory = directory = collector.directory
        self._index, self._loose, self._collector = index, collector.loose, collector
        entries = {name: collector.entries[name] for name in collector.files.stamps if name in collector.entries}
        self.explanations = [line for lines in collector.files.explanations.values() for line in lines]
        self.skipped = {
            str(directory / name / keys.RESULTS_FILE): entry.skipped for name, entry in entries.items() if entry.skipped
        }
        self.runs: dict[Run, list[Part]] = {}
        known: dict[str, Row] = {}
        for name, entry in entries.items():
            for number, summary in enumerate(entry.summaries):
                row = known.get(summary.settings)
                if row is None:
                    row = known[summary.settings] = Row.of(json.loads(summary.settings))
                trial_seed, hparams_seed, seed = summary.seeds
                test_envs = tuple(sorted(summary.test_envs))
                run = Run(row, summary.dataset, test_envs, trial_seed or 0, hparams_seed or 0, seed or 0)
                self.runs.setdefault(run, []).append(Part(name, number, summary))
        self.total = sum(part.summary.timing.checkpoints for parts in self.runs.values() for part in parts)

    def load(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """The kept records of some runs, jobs in name order.

        Those of a part share one dict of arguments and one of hparams.
        """
        wanted: dict[str, list[int]] = defaultdict(list)
        for run in runs:
            for part in self.runs[run]:
                wanted[part.name].append(part.number)
        found = []
        for name in sorted(wanted):
            kept = self._kept(name)
            found += [record for number in sorted(wanted[name]) for record in kept[number].records()]
        return found

    def _kept(self, name: str) -> list[Kept]:
        if name in self._loose:
            return self._loose[name]
        try:
            return self._index.kept(name)
        except (sqlite3.Error, Damaged):
            return self._collector.kept(name)

    def every(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """All records of some runs, from their files, jobs in name order."""
        wanted = set(runs)
        found = []
        for name in sorted({part.name for run in wanted for part in self.runs[run]}):
            with suppress(FileNotFoundError):
                found += keys.read_checkpoints(self.directory / name / keys.RESULTS_FILE)[0]
        return [record for record in found if Run.of(record["args"]) in wanted]

    def sweep_acc(self, method: type[SelectionMethod], runs: Sequence[Run]) -> float | None:
        """``method.sweep_acc`` of all records of these runs: one trial, row name, dataset and test environment."""
        if method is LeaveOneOutSelectionMethod and all(len(run.test_envs) != 2 for run in runs):
            return None
        if method in JUDGED:
            judged = self._judged(JUDGED[method], [run for run in runs if len(run.test_envs) == 1])
            if judged is not None:
                return chosen_acc(judged)
        ours = method is LeaveOneOutSelectionMethod or (method in JUDGED and not self._lack(JUDGED[method], runs))
        return method.sweep_acc(Q(self.load(runs) if ours else self.every(runs)))

    def _lack(self, method: str, runs: Iterable[Run]) -> bool:
        """Whether checkpoints will be left out, which are counted where all of them are looked at."""
        judged = (getattr(part.summary, method) for run in runs for part in self.runs[run])
        return any(some is not None and some.lacking for some in judged)

    def _judged(self, method: str, runs: Iterable[Run]) -> dict[Any, Accs] | None:
        """The accuracies of each draw that can be judged; None where that takes its records."""
        found: dict[Any, Accs | None] = {}
        lacking = []
        for run in runs:
            parts = self.runs[run]
            judged: Judged | None = getattr(parts[0].summary, method)
            if len(parts) > 1 or judged is None or run.hparams_seed in found:
                return None
            if judged.lacking:
                name = f"{run.row.name}, {run.dataset}, test_envs {list(run.test_envs)}, seed {run.seed}"
                lacking.append((f"{judged.lacking} of {judged.of}", name))
            accs = judged.accs
            found[run.hparams_seed] = None if accs is None else {"val_acc": accs[0], "test_acc": accs[1]}
        for how_many, name in lacking:
            warn_lacking(how_many, name)
        return {draw: accs for draw, accs in found.items() if accs is not None}

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Of each run the checkpoints that some way of choosing may take, its last, and those that are explained.

        Every checkpoint of runs that leave-one-out selection joins.
        """
        return self.load(self.runs)

    @cached_property
    def grouped(self) -> list[dict[str, Any]]:
        """Those records of runs that know groups."""
        return self.load(run for run, parts in self.runs.items() if any(part.summary.grouped for part in parts))

    @cached_property
    def several(self) -> list[dict[str, Any]]:
        """Those records of runs that test on several environments for their own sake."""
        return self.load(several_test_envs(self.runs))

    @property
    def timings(self) -> dict[Run, Timing]:
        """What each run took; of a run in several parts, the longest one."""
        parts = {run: [part.summary.timing for part in parts] for run, parts in self.runs.items()}
        return {run: max(timings, key=lambda timing: timing.steps) for run, timings in parts.items()}


def collect(directory: str | os.PathLike[str], index: bool = True) -> Collected:
    """All that tables need of the runs directly under a sweep's directory, which may still be running.

    Files that are not what they were when they were indexed, by size, times and inode, are read again.

    Args:
        index: use and renew the index in the directory; where that is not possible, everything is done without it.
    """
    place = Path(directory)
    with _without_garbage_collection():
        files = Files.of(place)
        try:
            old = Index.stored(place) if index else None
            return _collect(place, files, old, index)
        except (sqlite3.Error, Damaged):
            return _collect(place, files, None, index)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """For code that makes many objects and no cycles, which the collector of cycles would look at again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _collect(directory: Path, files: Files, old: Index | None, index: bool) -> Collected:
    collector = Collector(directory, files, old)
    if old is not None and collector.is_current:
        return Collected(collector, old)
    if index and files.stamps:
        try:
            return Collected(collector, _renewed(collector, old))
        except (OSError, sqlite3.OperationalError) as error:
            logger.warning("%s: goes without an index: %s", directory, error)
            collector = Collector(directory, files, old)
    made = Index.new(None, old)
    collector.update(made)
    return Collected(collector, made)


def _renewed(collector: Collector, old: Index | None) -> Index:
    """The index brought up to date, in its place; a directory without records gets none."""
    _remove_leftovers(collector.directory)
    descriptor, temporary = tempfile.mkstemp(TEMPORARY, f"{INDEX_FILE}.", collector.directory)
    try:
        made = Index.new(Path(temporary), old)
        collector.update(made)
        if collector.is_empty:
            os.unlink(temporary)  # what is open stays readable
            return made
        os.fsync(descriptor)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, collector.directory / INDEX_FILE)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
    return made


def _remove_leftovers(directory: Path) -> None:
    """Of collectors that were killed."""
    for path in directory.glob(f"{INDEX_FILE}.*{TEMPORARY}"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - LEFTOVER_S:
                path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
