"""How far a sweep is: what its jobs' statuses add up to, as text and as JSON."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from domainbed.job_lists import Listed
from domainbed.rows import ALWAYS_NAMED
from domainbed.states import QUEUED, State, Status

OPEN = (State.QUEUED, State.RUNNING, State.PREEMPTED)  # what launching brings to an end
UNKNOWN = "?"
SHOWN_RUNNING, SHOWN_FAILURES = 10, 5
RECENT = 50  # completions from which the rate is taken


class Entry(NamedTuple):
    """A job and its status."""

    job: Listed
    status: Status

    @property
    def cell(self) -> tuple[str, str]:
        return row_name(self.job.args), self.job.args.get("dataset", UNKNOWN)


@dataclass
class Overview:
    """What a sweep's jobs add up to.

    Attributes:
        now: unix seconds of the look.
        cells: number of jobs by row and dataset, then by state; in the order of the jobs.
        running: longest silent first.
        failed: newest first.
        jobs_per_hour: over the recent completions; None where they are too few to tell.
        left_s: until all are done at that rate; None where nothing runs, or there is no rate.
    """

    now: float
    cells: dict[tuple[str, str], Counter[State]] = field(default_factory=dict)
    running: list[Entry] = field(default_factory=list)
    failed: list[Entry] = field(default_factory=list)
    jobs_per_hour: float | None = None
    left_s: float | None = None

    @property
    def counts(self) -> Counter[State]:
        """Number of jobs by state."""
        return sum(self.cells.values(), Counter())

    @property
    def is_over(self) -> bool:
        """Whether all jobs are done or failed."""
        return not any(self.counts[state] for state in OPEN)


def row_name(args: Mapping[str, Any]) -> str:
    """What stands for a job's row: its label, or the algorithm, with a partition that is not its own; its budgets."""
    name = str(args.get("label") or args.get("algorithm", UNKNOWN))
    name = name if args.get("label") or not args.get("partition") else f"{name}:{args['partition']}"
    budgets = [f"{word}={args[key]}" for key, word in ALWAYS_NAMED.items() if args.get(key, 1) != 1]
    return " ".join([name, *budgets])


def overview(jobs: Iterable[Listed], statuses: Mapping[str, Status], now: float) -> Overview:
    """Adds up the jobs' statuses; a job without one is queued.

    Args:
        statuses: by the names of the jobs' directories.
        now: unix seconds.
    """
    found, done = Overview(now), []
    for job in jobs:
        entry = Entry(job, statuses.get(job.name, QUEUED))
        found.cells.setdefault(entry.cell, Counter())[entry.status.state] += 1
        if entry.status.state is State.RUNNING:
            found.running.append(entry)
        elif entry.status.state is State.FAILED:
            found.failed.append(entry)
        elif entry.status.state is State.DONE:
            done.append(entry.status.time or 0.0)
    found.running.sort(key=lambda entry: -(entry.status.heartbeat_age_s or 0.0))
    found.failed.sort(key=lambda entry: -(entry.status.time or 0.0))
    found.jobs_per_hour = rate(done, now, len(found.running))
    if found.running and found.jobs_per_hour:
        found.left_s = 3600 * sum(found.counts[state] for state in OPEN) / found.jobs_per_hour
    return found


def rate(done: Sequence[float], now: float, running: int) -> float | None:
    """Jobs per hour from the times of the last completions; None where they are too few to tell.

    Args:
        done: unix seconds.
        running: how many run now. So many may have ended at once, which says nothing; and if some do, the time since
            the last completion counts too, lest a sweep that got stuck seem fast.
    """
    recent = sorted(done)[-RECENT:]
    if len(recent) < max(2, running + 1):
        return None
    between = (recent[-1] - recent[0]) / (len(recent) - 1)
    waited = (now - recent[0]) / len(recent) if running else 0.0
    return 3600 / max(between, waited, 1e-3)


def as_json(found: Overview, sweep_dir: str) -> dict[str, Any]:
    """The overview as a JSON object; ``scripts/sweep_status.py`` documents its keys."""
    return {
        "sweep": sweep_dir,
        "time": found.now,
        "jobs": found.counts.total(),
        "counts": _counts(found.counts),
        "rows": [
            {"row": row, "dataset": dataset, "jobs": counts.total(), "counts": _counts(counts)}
            for (row, dataset), counts in found.cells.items()
        ],
        "running": [_facts(e, "host", "pid", "heartbeat_age_s", "step", "steps", "attempt") for e in found.running],
        "failures": [_facts(e, "error", "attempt", "time") for e in found.failed],
        "jobs_per_hour": found.jobs_per_hour,
        "left_s": found.left_s,
    }


def _counts(counts: Mapping[State, int]) -> dict[str, int]:
    return {state.value: counts[state] for state in State}


def _facts(entry: Entry, *names: str) -> dict[str, Any]:
    row, dataset = entry.cell
    facts = {name: getattr(entry.status, name) for name in names}
    return {"directory": entry.job.name, "row": row, "dataset": dataset, **facts}


def as_text(found: Overview) -> str:
    """The overview for a terminal: a table, how fast it goes, what runs, and the newest failures."""
    parts = [_table(found), _progress(found)]
    if found.running:
        parts.append(_listed("Running:", map(_running_line, found.running[:SHOWN_RUNNING]), len(found.running)))
    if found.failed:
        parts.append(_listed("Newest failures:", map(_failure_line, found.failed[:SHOWN_FAILURES]), len(found.failed)))
    return "\n\n".join(parts) + "\n"


def _table(found: Overview) -> str:
    header = ["", "", *(state.value for state in State), "total"]
    lines = [[row, dataset, *_cells(counts)] for (row, dataset), counts in found.cells.items()]
    lines = [header, *lines, ["all", "", *_cells(found.counts)]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _cells(counts: Counter[State]) -> list[str]:
    return [*(str(counts[state] or "-") for state in State), str(counts.total())]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    padded = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
    return "  ".join(padded).rstrip()


def _progress(found: Overview) -> str:
    total = found.counts.total()
    parts = [f"{found.counts[State.DONE]} of {total} jobs done"]
    if found.jobs_per_hour is not None:
        speed = found.jobs_per_hour
        parts.append(f"{speed:,.0f} an hour lately" if speed >= 100 else f"{speed:.3g} an hour lately")
    if found.left_s is not None:
        end = time.strftime("%a %d %b %H:%M", time.localtime(found.now + found.left_s))
        parts.append(f"the last one in about {duration(found.left_s)} ({end})")
    elif any(found.counts[state] for state in OPEN):
        parts.append("nothing runs" if not found.running else "too few are done to tell the end")
    return ", ".join(parts) + "."


def duration(seconds: float) -> str:
    """In the largest unit that counts: ``50 s``, ``12 min``, ``3.5 h``, ``4.1 days``."""
    for unit, length, below in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < below * length:
            return f"{seconds / length:.1f} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _listed(title: str, lines: Iterable[str], total: int) -> str:
    shown = list(lines)
    more = [f"  ... and {total - len(shown)} more"] if total > len(shown) else []
    return "\n".join([title, *(f"  {line}" for line in shown), *more])


def _running_line(entry: Entry) -> str:
    status, (row, dataset) = entry.status, entry.cell
    who = f"{status.host or UNKNOWN} process {status.pid or UNKNOWN}"
    step = "starting" if status.step is None else f"step {status.step} of {status.steps or UNKNOWN}"
    seen = f"seen {duration(status.heartbeat_age_s or 0.0)} ago"
    return f"{entry.job.name}  {row} on {dataset}: {step}, {who}, {seen}"


def _failure_line(entry: Entry) -> str:
    row, dataset = entry.cell
    return f"{entry.job.name}  {row} on {dataset}: {entry.status.error or 'no message'}"
