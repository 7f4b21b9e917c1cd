"""Brings an index up to date with the files of a sweep's directory."""

import json
import os
import stat
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed import explanation_records
from domainbed import records as keys
from domainbed.condensing import condense
from domainbed.condensing.lines import parse
from domainbed.model_selection import validation_envs
from domainbed.run_index.database import Entry, Index, Kept, Stamp

RECENT_NS = 2 * 10**9  # a file as young as this may change once more without a new time


@dataclass(frozen=True)
class Files:
    """What lies in a sweep's directory: the stamp of each results file, and the explanations, jobs in name order."""

    stamps: dict[str, Stamp]
    explanations: dict[str, list[dict[str, Any]]]

    @classmethod
    def of(cls, directory: Path) -> "Files":
        stamps, explained = {}, []
        for name in sorted(os.listdir(directory)):
            with suppress(OSError):
                found = os.stat(f"{directory}/{name}/{keys.RESULTS_FILE}")
                if stat.S_ISREG(found.st_mode):
                    stamps[name] = stamp_of(found)
            if os.path.isfile(f"{directory}/{name}/{explanation_records.EXPLANATIONS_FILE}"):
                explained.append(name)
        return cls(stamps, {name: explanation_records.read(directory / name) for name in explained})

    def steps(self, name: str) -> tuple[Any, ...]:
        """The explained steps of a run."""
        return tuple(explanation_records.settings_of(line).step for line in self.explanations.get(name, ()))

    def explain_no_more(self, name: str, steps: Collection[Any]) -> bool:
        """Whether the run's explanations are of these steps only."""
        return name not in self.explanations or set(self.steps(name)) <= set(steps)


def stamp_of(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class Pairs:
    """Which datasets have runs that leave-one-out selection joins with others, step by step."""

    def __init__(self) -> None:
        self._kinds: dict[str, set[int]] = defaultdict(set)

    def add(self, dataset: str, test_envs: Collection[int]) -> None:
        self._kinds[dataset].add(len(test_envs))

    def __bool__(self) -> bool:
        return any({1, 2} <= kinds for kinds in self._kinds.values())

    def concern(self, dataset: str, test_envs: Collection[int]) -> bool:
        """Whether each step of such a run is needed; never where official environments validate."""
        return {1, 2} <= self._kinds[dataset] and len(test_envs) in (1, 2) and not validation_envs(dataset)


class Collector:
    """Brings the index of a directory up to date."""

    def __init__(self, directory: Path, files: Files, old: Index | None):
        self.directory, self.files = directory, files
        self.entries: dict[str, Entry] = {}
        self.loose: dict[str, list[Kept]] = {}  # what the index can't hold
        self.pairs = Pairs()
        self.changed = list(files.stamps)
        self.vanished: list[str] = []
        if old is not None:
            self._take_over(old)

    def _take_over(self, old: Index) -> None:
        """What the index says of files that are as they were."""
        entries = old.entries()
        official = old.official()
        datasets = {summary.dataset for entry in entries.values() for summary in entry.summaries}
        other = {dataset for dataset in datasets if official.get(dataset) != tuple(validation_envs(dataset))}
        for name, stamp in self.files.stamps.items():
            entry = entries.get(name)
            if entry is None or entry.stamp != stamp or not self.files.explain_no_more(name, entry.explained):
                continue
            if not other or not any(summary.dataset in other for summary in entry.summaries):
                self._note(name, entry)
        self.changed = [name for name in self.files.stamps if name not in self.entries]
        self.vanished = [name for name in entries if name not in self.files.stamps]

    def _note(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        for summary in entry.summaries:
            self.pairs.add(summary.dataset, summary.test_envs)

    def update(self, index: Index) -> None:
        """Reads what is not known yet."""
        database = index.database
        database.execute("BEGIN")
        index.forget([*self.vanished, *self.changed])
        for name in self.changed:
            self._read(name, index)
        for name in self._cut_short():
            self._read(name, index)
        datasets = {summary.dataset for entry in self.entries.values() for summary in entry.summaries}
        official = [(dataset, json.dumps(list(validation_envs(dataset)))) for dataset in datasets]
        database.executemany("INSERT OR REPLACE INTO official VALUES (?, ?)", official)
        database.execute("COMMIT")

    def _cut_short(self) -> list[str]:
        """The files of which too little was kept before it was known which runs belong together."""
        if not self.pairs:
            return []
        return [
            name
            for name, entry in self.entries.items()
            if any(self.pairs.concern(s.dataset, s.test_envs) and not s.whole for s in entry.summaries)
        ]

    @property
    def is_empty(self) -> bool:
        """Whether no file holds a record."""
        return not any(entry.summaries for entry in self.entries.values())

    @property
    def is_current(self) -> bool:
        return not (self.changed or self.vanished or self._cut_short())

    def _read(self, name: str, index: Index) -> None:
        found = read(self.directory / name, self.pairs, self.files.steps(name))
        if found is None:  # gone since
            self.entries.pop(name, None)
            index.forget([name])
            return
        entry, kept = found
        self._note(name, entry)
        try:
            index.put(name, entry, kept)
        except (OverflowError, UnicodeEncodeError):
            self.loose[name] = kept

    def kept(self, name: str) -> list[Kept]:
        """What to keep of a results file, from the file."""
        found = read(self.directory / name, self.pairs, self.files.steps(name))
        return [] if found is None else found[1]


def read(run: Path, pairs: Pairs, explained: tuple[Any, ...]) -> tuple[Entry, list[Kept]] | None:
    """A run's results file, condensed; None if it is gone."""
    try:
        with open(run / keys.RESULTS_FILE, "rb", buffering=0) as file:
            stamp = stamp_of(os.fstat(file.fileno()))
            data = file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    segments, skipped = parse(data)
    segments = [segment for segment in segments if not all(map(keys.is_full_data, segment.shapes))]
    for segment in segments:
        pairs.add(segment.args["dataset"], segment.args["test_envs"])
    condensed = [
        condense(segment, pairs.concern(segment.args["dataset"], segment.args["test_envs"]), explained)
        for segment in segments
    ]
    young = max(stamp[1:3]) > time.time_ns() - RECENT_NS
    entry = Entry(None if young else stamp, explained, skipped, [part.summary for part in condensed])
    return entry, [Kept.of(part.segment) for part in condensed]
