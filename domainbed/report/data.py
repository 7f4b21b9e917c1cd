"""What goes into the report: the runs of a sweep's directory and how they stand, read from its files."""

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from domainbed import job_lists, jobs, records, rows, states
from domainbed.commands import train_command
from domainbed.report.curves import Curves, curves
from domainbed.states import State, Status
from domainbed.status_tables import UNKNOWN

TAIL_LINES, TAIL_WIDTH = 20, 160  # of out.txt and err.txt: lines, characters of a line
_TAIL_BYTES, _HEAD_BYTES = 16_384, 4_096
_HASH = re.compile(r"[0-9a-f]{32}")
_VERSION = re.compile(r"\t([\w.-]+): (\S+)")


@dataclass
class RunFacts:
    """A job of the sweep, with whatever its directory holds.

    Attributes:
        name: of its directory.
        args: of train, from its records, else from the sweep's list; empty where neither knows.
        hparams: as it was trained; empty before the first record.
        row: how tables call its row.
        curves: None where there are no records.
        out, err: last lines of out.txt and err.txt.
        models: names and sizes in bytes of its model files.
        versions: of Python and packages, as its log says.
        counted: its last record, where it has one, for counts of groups.
    """

    name: str
    status: Status
    args: Mapping[str, Any]
    hparams: Mapping[str, Any] = field(default_factory=dict)
    row: str = UNKNOWN
    curves: Curves | None = None
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    models: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    counted: Mapping[str, Any] | None = None

    @property
    def dataset(self) -> str:
        return str(self.args.get("dataset", UNKNOWN))

    def command(self, sweep_dir: str) -> str:
        """The shell command that trains it; empty where its arguments are not known."""
        if not self.args:
            return ""
        return train_command(jobs.given({**self.args, "output_dir": f"{sweep_dir}/{self.name}"}))


@dataclass
class Sweep:
    """A sweep's directory as it was found.

    Attributes:
        directory: as the user named it.
        made: unix seconds of the look.
        runs: in the order of the sweep's list, others by name.
        total: number of legible records.
        skipped: number of lines that hold no record, by run; none of 0.
        listed: number of jobs on the sweep's own list.
    """

    directory: str
    made: float
    runs: list[RunFacts]
    total: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    listed: int = 0

    @property
    def name(self) -> str:
        return Path(self.directory).resolve().name

    @property
    def counts(self) -> Counter[State]:
        """Number of jobs by state."""
        return Counter(run.status.state for run in self.runs)

    def versions(self) -> dict[str, Counter[str]]:
        """Number of runs by version of each package."""
        found: dict[str, Counter[str]] = {}
        for run in self.runs:
            for package, version in run.versions.items():
                found.setdefault(package, Counter())[version] += 1
        return found


def look(directory: str, criterion: str) -> Sweep:
    """Reads a sweep's directory, also while its jobs run.

    Args:
        criterion: a name in ``model_selection.CRITERIA``, by which each run's checkpoint is chosen.

    Raises:
        FileNotFoundError: no such directory, or neither a job nor a run in it.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"--input_dir {directory} is no directory; name the --output_dir of a sweep")
    statuses, listed = states.scan(directory), job_lists.read(directory)
    known = {job.name: job.args if records.names_run(job._asdict()) else {} for job in listed}
    others = [name for name, status in statuses.items() if status != states.QUEUED or _HASH.fullmatch(name)]
    names = [*known, *sorted(set(others) - known.keys())]
    if not names:
        raise FileNotFoundError(
            f"--input_dir {directory} holds neither runs (*/{records.RESULTS_FILE}) nor a list of jobs "
            f"({job_lists.JOBS_FILE}); name the --output_dir of a sweep"
        )
    sweep = Sweep(directory, time.time(), [], listed=len(listed))
    for name in names:
        run = RunFacts(name, statuses.get(name, states.QUEUED), known.get(name, {}))
        _read_files(sweep, run, criterion)
        sweep.runs.append(run)
    _name_rows(sweep.runs)
    return sweep


def _read_files(sweep: Sweep, run: RunFacts, criterion: str) -> None:
    place = Path(sweep.directory, run.name)
    run.out, run.err = tail(place / "out.txt"), tail(place / "err.txt")
    run.versions = _versions(place / "out.txt")
    run.models = {path.name: path.stat().st_size for path in sorted(place.glob("model*.pkl"))}
    try:
        found, skipped = records.read_checkpoints(place / records.RESULTS_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return
    sweep.total += len(found)
    if skipped:
        sweep.skipped[run.name] = skipped
    if found:
        run.args, run.counted = found[-1]["args"], found[-1]
        run.hparams = found[-1].get("hparams") or {}
        run.curves = curves(found, criterion)


def _name_rows(runs: Iterable[RunFacts]) -> None:
    """Names the rows as tables do."""
    known = [(run, rows.Run.of(run.args)) for run in runs if run.args]
    names = rows.row_names(rows.meeting(of for _, of in known).values())
    for run, of in known:
        run.row = names[of.row]


def tail(path: Path) -> list[str]:
    """The last lines of a text file, long ones cut; none where there is no file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.splitlines()[-TAIL_LINES:]]
    return [line if len(line) <= TAIL_WIDTH else line[:TAIL_WIDTH] + " …" for line in lines]


def _versions(path: Path) -> dict[str, str]:
    """What a run's log says in its head under "Environment:"."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    found = {}
    for line in _after(head, "Environment:"):
        if not (match := _VERSION.match(line)):
            break
        found[match[1]] = match[2]
    return found


def _after(lines: Sequence[str], title: str) -> Sequence[str]:
    return lines[lines.index(title) + 1 :] if title in lines else []
