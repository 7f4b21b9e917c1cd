"""What a sweep will take: jobs, steps and hours, by row and dataset, from what its kinds of job were timed at."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from domainbed import registry
from domainbed.rows import Row, meeting, row_names, runs
from domainbed.table_formats import Table, render

Args = Mapping[str, Any]

UNKNOWN = "-"
_HOUR = 3600.0
_OF_ONE_JOB = ("seed", "trial_seed", "hparams_seed", "output_dir")  # jobs that differ in these are of one kind
_HEADER = ("Row", "Dataset", "Jobs", "To do", "Steps", "s/step", "Records", "s/record", "A job", "To do in all")


@dataclass(frozen=True)
class Timing:
    """How long a job is, and what it was timed at.

    Attributes:
        steps: updates.
        checkpoint_freq: updates between two records.
        step_s, evaluation_s: seconds of an update, and of the evaluation for one record.
        start_s: seconds until the first update, without the start of Python.
        extrapolated: the evaluation was timed on some of the images.
        stops_early: the job may end before its last step.
    """

    steps: int
    checkpoint_freq: int
    step_s: float
    evaluation_s: float
    start_s: float
    extrapolated: bool = False
    stops_early: bool = False

    @property
    def job_s(self) -> float:
        """Seconds of one job."""
        return self.start_s + self.steps * self.step_s + records(self.steps, self.checkpoint_freq) * self.evaluation_s


@dataclass
class Kind:
    """Jobs that differ in nothing but seeds and draws of hparams, and in which environments they test, not how many.

    Attributes:
        draws: the arguments of one job for each draw of hparams.
        jobs: how many there are.
        to_do: how many of them are not done.
        timing: what one of them takes; None where it is not known.
        reason: why it is not known.
    """

    draws: dict[tuple[int, int], Args] = field(default_factory=dict)
    jobs: int = 0
    to_do: int = 0
    timing: Timing | None = None
    reason: str = ""

    @property
    def args(self) -> Args:
        """The arguments of one of the jobs."""
        return next(iter(self.draws.values()))

    @property
    def length(self) -> tuple[int, int] | None:
        """Steps, and steps between two records; None where only the data can tell."""
        if self.timing:
            return self.timing.steps, self.timing.checkpoint_freq
        return declared_length(self.args)


def records(steps: int, checkpoint_freq: int) -> int:
    """How many records a run writes: every so many steps, and at the last one."""
    return len({*range(0, steps, checkpoint_freq), steps - 1})


def declared_length(args: Args) -> tuple[int, int] | None:
    """Steps, and steps between two records, from arguments and the dataset's class; None where only the data tell."""
    if args.get("epochs"):
        return None
    steps = args.get("steps") or registry.attribute("datasets", args["dataset"], "N_STEPS")
    freq = args.get("checkpoint_freq") or registry.attribute("datasets", args["dataset"], "CHECKPOINT_FREQ")
    return None if steps is None or freq is None else (steps, freq)


def kinds(args_list: Iterable[Args], done: Iterable[bool]) -> list[Kind]:
    """The jobs by kind, in order of appearance.

    Args:
        done: of each job, whether it is done.
    """
    found: dict[str, Kind] = {}
    for args, is_done in zip(args_list, done, strict=True):
        settings = {key: value for key, value in args.items() if key not in _OF_ONE_JOB}
        settings["test_envs"] = len(args["test_envs"])
        kind = found.setdefault(json.dumps(settings, sort_keys=True), Kind())
        kind.draws.setdefault((args["hparams_seed"], args["hparams_seed"] and args["trial_seed"]), args)
        kind.jobs += 1
        kind.to_do += not is_done
    return list(found.values())


def names(several: Sequence[Kind]) -> list[str]:
    """The row's name of each kind, as tables call it."""
    found = row_names(meeting(runs({"args": kind.args} for kind in several)).values())
    return [found[Row.of(kind.args)] for kind in several]


def table(several: Sequence[Kind]) -> str:
    """A line for each row on each dataset; kinds that differ in the number of test environments share one."""
    lines: dict[tuple[str, str], list[Kind]] = {}
    for kind, name in zip(several, names(several), strict=True):
        lines.setdefault((name, kind.args["dataset"]), []).append(kind)
    rows = [[*place, *_cells(some)] for place, some in lines.items()]
    return render([Table("Plan", ["Means over the jobs of a line."], _HEADER, rows)], "text")


def _cells(some: Sequence[Kind]) -> list[str]:
    steps = _mean(some, lambda kind: kind.length[0] if kind.length else None)
    written = _mean(some, lambda kind: records(*kind.length) if kind.length else None)
    step = _mean(some, lambda kind: kind.timing.step_s if kind.timing else None)
    evaluation = _mean(some, lambda kind: kind.timing.evaluation_s if kind.timing else None)
    job = _mean(some, lambda kind: kind.timing.job_s if kind.timing else None)
    counts = sum(kind.jobs for kind in some), sum(kind.to_do for kind in some)
    times = [UNKNOWN] * 2 if job is None else [_duration(job / _HOUR), _duration(hours(some))]
    return [*map(_number, (*counts, steps, step, written, evaluation)), *times]


def _mean(some: Sequence[Kind], value: Callable[[Kind], float | None]) -> float | None:
    """The mean over jobs of what each job of a kind has; None if that is not known of one."""
    values = [(kind.jobs, value(kind)) for kind in some]
    known = [(jobs, found) for jobs, found in values if found is not None]
    return sum(jobs * found for jobs, found in known) / sum(jobs for jobs, _ in known) if known == values else None


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def hours(several: Iterable[Kind]) -> float:
    """Hours of all jobs to do, one after the other, as far as they are known."""
    return sum(kind.to_do * kind.timing.job_s for kind in several if kind.timing) / _HOUR


def wall_hours(several: Sequence[Kind], workers: int) -> float:
    """Hours until all jobs are done that are to be, so many at a time: not less than the longest takes."""
    longest = max((kind.timing.job_s / _HOUR for kind in several if kind.timing and kind.to_do), default=0.0)
    return max(longest, hours(several) / workers)


def summary(several: Sequence[Kind], workers: int, where: str | None) -> str:
    """The totals in sentences.

    Args:
        where: what the jobs were timed on; None if they were not.
    """
    jobs, to_do = sum(kind.jobs for kind in several), sum(kind.to_do for kind in several)
    steps = sum(kind.to_do * kind.length[0] for kind in several if kind.length)
    unknown = [kind for kind in several if kind.length is None and kind.to_do]
    but = f", without those of {sum(kind.to_do for kind in unknown):,} jobs" if unknown else ""
    lines = [f"{jobs:,} jobs: {jobs - to_do:,} done, {to_do:,} to do, {steps:,} steps{but}."]
    if where is not None:
        lines += _hours_in_words(several, workers, where)
    return "\n".join(lines) + "\n"


def _hours_in_words(several: Sequence[Kind], workers: int, where: str) -> list[str]:
    lines, timings = _left_out(several), [kind.timing for kind in several if kind.timing]
    if timings:
        found = f"{hours(several):,.2f} hours of jobs, one after the other; about "
        found += f"{_duration(wall_hours(several, workers))} with {workers} at a time (--workers). Timed on {where}."
        lines.insert(0, found)
    if any(timing.extrapolated for timing in timings):
        lines.append("Some evaluations are extrapolated from part of their images.")
    if any(timing.stops_early for timing in timings):
        lines.append("Rows with a patience are counted with all their steps: an upper bound.")
    if any(kind.args.get("explain") for kind in several):
        lines.append("What --explain takes is not counted.")
    return lines


def _left_out(several: Sequence[Kind]) -> list[str]:
    """A sentence for each reason why jobs are in no hours, naming one of the rows."""
    places: dict[tuple[str, str], dict[str, int]] = {}
    for kind, name in zip(several, names(several), strict=True):
        if kind.reason and kind.to_do:
            rows = places.setdefault((kind.args["dataset"], kind.reason), {})
            rows[name] = rows.get(name, 0) + kind.to_do
    found = []
    for (dataset, reason), rows in places.items():
        name, others = next(iter(rows)), len(rows) - 1
        who = f"{name} and {others} more rows" if others else name
        found.append(f"Left out of the hours, {sum(rows.values()):,} jobs: {who} on {dataset}: not known: {reason}")
    return found


def _duration(in_hours: float) -> str:
    """A time in hours, or minutes or seconds if it is short."""
    if in_hours >= 1:
        return f"{in_hours:,.1f} h"
    return f"{in_hours * 60:.1f} min" if in_hours * 60 >= 2 else f"{in_hours * _HOUR:.0f} s"
