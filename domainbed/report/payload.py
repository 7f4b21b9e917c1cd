"""The numbers that the page's script draws, as JSON that is safe inside HTML."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from domainbed.group_tables import cell_titles, group_name
from domainbed.model_selection import choose
from domainbed.report.curves import Curves, rounded
from domainbed.report.data import RunFacts, Sweep
from domainbed.rows import Run, meeting, row_names


def script(content: Any, key: str) -> str:
    """Data as an element that no browser runs, and that no text in it can end."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    safe = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{key}">{safe}</script>'


def index(sweep: Sweep) -> list[dict[str, Any]]:
    """A line of the list of runs for each job."""
    return [_line(run) for run in sweep.runs]


def _line(run: RunFacts) -> dict[str, Any]:
    line: dict[str, Any] = {"name": run.name, "state": run.status.state.value, "dataset": run.dataset, "row": run.row}
    seeds = {"trial": "trial_seed", "draw": "hparams_seed", "seed": "seed"}
    line |= {short: run.args[key] for short, key in seeds.items() if run.args.get(key) is not None}
    line["envs"] = ", ".join(map(str, run.args.get("test_envs", ())))
    if (curves := run.curves) is not None:
        position = len(curves.steps) - 1 if curves.chosen is None else curves.chosen
        line |= {"step": curves.steps[-1], "taken": curves.steps[position]}
        for key, name in (("aa", "AA test"), ("wga", "WGA test")):
            line[key] = curves.series.get(name, [None] * len(curves.steps))[position]
    elif run.status.step is not None:
        line["step"] = run.status.step
    return line


def run_page(run: RunFacts, sweep_dir: str) -> dict[str, Any]:
    """What the page of one run shows; what is empty is left out."""
    status = run.status
    facts = {"host": status.host, "process": status.pid, "attempt": status.attempt, "steps": status.steps}
    page = {
        "status": {key: value for key, value in facts.items() if value is not None},
        "error": status.error,
        "args": strings(run.args),
        "hparams": strings(run.hparams),
        "command": run.command(sweep_dir),
        "out": run.out,
        "err": run.err,
        "models": run.models,
    }
    page = {key: value for key, value in page.items() if value not in (None, "", [], {})}
    return page if run.curves is None else page | _curves(run.curves, run.args)


def _curves(curves: Curves, args: Mapping[str, Any]) -> dict[str, Any]:
    names = {g: group_name(args, g) for counts in curves.counts.values() for g in counts}
    return {
        "steps": curves.steps,
        "chosen": curves.chosen,
        "series": curves.series,
        "groups": [[names[g], values] for g, values in curves.groups.items()],
        "table": [_group_line(curves, g, names[g]) for g in sorted(names)],
    }


def _group_line(curves: Curves, g: int, name: str) -> list[Any]:
    """Name; training, validation and test images; accuracy on validation and test where taken, on test at last."""
    counts = [curves.counts[part].get(g, 0) for part in ("training", "validation", "test")]
    test = curves.groups.get(g)
    taken = test[-1 if curves.chosen is None else curves.chosen] if test else None
    return [name, *counts, curves.validation.get(g), taken, test[-1] if test else None]


def strings(values: Mapping[str, Any]) -> dict[str, str]:
    """The values as JSON has them, those that are not given left out."""
    given = {key: value for key, value in values.items() if value is not None}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}


def scatter(sweep: Sweep, records: Sequence[Mapping[str, Any]], criterion: str) -> list[dict[str, Any]]:
    """AA against WGA on test, a point for each trial, by dataset and row; runs without groups have none."""
    chosen = choose(records, criterion)
    names = row_names(meeting(choice.run for choice in chosen).values())
    directories = _directories(sweep.runs)
    plots: dict[str, dict[str, list[Any]]] = {}
    titles = cell_titles({choice.run.cell for choice in chosen})
    for cell, title in titles.items():
        for choice in (one for one in chosen if one.run.cell == cell):
            aa_wga = map(rounded, choice.test)
            point = [*aa_wga, choice.run.trial_seed, directories.get(choice.run)]
            plots.setdefault(title, {}).setdefault(names[choice.run.row], []).append(point)
    return [{"title": title, "rows": dict(sorted(rows.items()))} for title, rows in plots.items()]


def _directories(runs: Iterable[RunFacts]) -> dict[Run, str]:
    """The directory of each run that has records."""
    return {Run.of(run.args): run.name for run in runs if run.counted is not None}
