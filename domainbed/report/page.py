"""The report as one page of HTML: everything it needs is inside, so nothing is ever loaded from anywhere."""

import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import domainbed
from domainbed import job_lists, records
from domainbed.report import payload
from domainbed.report.data import Sweep
from domainbed.report.datasets import Card, dataset_cards
from domainbed.report.figures import FOLDER, figures_html
from domainbed.report.table_families import Family, families
from domainbed.report.tables import table_html
from domainbed.run_index import Collected
from domainbed.states import State
from domainbed.status_tables import duration

SYMBOLS = {  # beside the word, never instead of it
    State.QUEUED: "○",
    State.RUNNING: "▶",
    State.PREEMPTED: "‖",
    State.FAILED: "✕",
    State.DONE: "✓",
}
SHOWN_FAILURES = 20
CRITERION_WORDS = {"aa_wga": "(AA + WGA) / 2 on validation", "wga": "WGA on validation"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(sweep: Sweep, collected: Collected, criterion: str, command: str, reference: str | None = None) -> str:
    """The whole page.

    Args:
        collected: what tables need of the sweep's records.
        criterion: a name in ``model_selection.CRITERIA``, for the list of runs, their pages and the scatter.
        command: the shell command that makes this page.
        reference: the row that times are compared with.
    """
    found = families(collected, reference) if collected.runs else []
    plots = payload.scatter(sweep, collected.grouped, criterion)
    sections = {
        "summary": ("Summary", summary(sweep)),
        "tables": ("Tables", tables_section(found)),
        "figures": ("Figures", figures_section(sweep, plots, criterion)),
        "runs": ("Runs", runs_section(sweep, criterion)),
        "datasets": ("Datasets", datasets_section(dataset_cards(sweep.runs))),
        "commands": ("Commands and versions", commands(sweep, command)),
    }
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, (title, _) in sections.items())
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h" tabindex="-1">{title}</h2>{html}</section>'
        for key, (title, html) in sections.items()
    )
    rows = sorted({row for plot in plots for row in plot["rows"]})
    index = {"runs": payload.index(sweep), "plots": plots, "rows": rows, "symbols": SYMBOLS}
    data = [payload.script(index, "index")]
    data += [payload.script(payload.run_page(run, sweep.directory), f"run-{i}") for i, run in enumerate(sweep.runs)]
    return _document(f"{sweep.name}: report", _header(sweep, links), body, data)


def _document(title: str, header: str, body: str, data: Iterable[str]) -> str:
    here = Path(__file__)
    css, js = (here.with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<!DOCTYPE html>\n<html lang="en" class="no-js">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">Skip to the content</a>\n{header}\n<main id="main" tabindex="-1">\n'
        f'<noscript><p class="note">Sorting, filters, charts and the pages of single runs need JavaScript; tables and '
        f"figures do not.</p></noscript>\n"
        f'<div id="overview">{body}</div>\n<article id="run" aria-labelledby="run-title" hidden></article>\n</main>\n'
        f"{''.join(data)}\n<script>\n{js}</script>\n</body>\n</html>\n"
    )


def _header(sweep: Sweep, links: str) -> str:
    return (
        f'<header class="top"><div><p class="kind">Sweep report</p><h1>{escape(sweep.name)}</h1></div>'
        f'<button type="button" id="theme" class="needs-js">Dark colours</button>'
        f'<nav aria-label="Parts of the report"><ul>{links}</ul></nav></header>'
    )


def when(seconds: float) -> str:
    """A moment in universal time, as text and for machines."""
    moment = time.gmtime(seconds)
    iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", moment)
    return f'<time datetime="{iso}">{time.strftime("%Y-%m-%d %H:%M UTC", moment)}</time>'


def badge(state: State) -> str:
    return f'<span class="badge {state}"><span aria-hidden="true">{SYMBOLS[state]}</span> {state}</span>'


def summary(sweep: Sweep) -> str:
    """When, how many in which state, what failed, what was read."""
    counts = sweep.counts
    items = "".join(f"<li><strong>{counts[state]}</strong> {badge(state)}</li>" for state in State)
    open_jobs = sum(counts[state] for state in (State.QUEUED, State.RUNNING, State.PREEMPTED))
    over = "All jobs are done or failed." if not open_jobs else f"{open_jobs} jobs are not done: numbers may change."
    lines = sum(sweep.skipped.values())
    facts = f"{sweep.total} records in {sum(run.curves is not None for run in sweep.runs)} runs"
    skipped = f"; {lines} lines that hold no record were skipped{_skipped(sweep)}" if lines else "; no line was skipped"
    return (
        f'<ul class="states" aria-label="Jobs by state">{items}</ul>'
        f"<p>Made {when(sweep.made)}: {len(sweep.runs)} jobs. {over} {facts}{skipped}.</p>{_running(sweep)}"
        f"{_failures(sweep)}"
    )


def _skipped(sweep: Sweep) -> str:
    names = ", ".join(f"{run_link(name)} ({n})" for name, n in list(sweep.skipped.items())[:5])
    return f" ({names}{', ...' if len(sweep.skipped) > 5 else ''})"


def run_link(name: str) -> str:
    return f'<a class="run" href="#run/{quote(name, safe="!~*()")}">{escape(name[:10])}</a>'


def _running(sweep: Sweep) -> str:
    lines = []
    for run in (run for run in sweep.runs if run.status.state is State.RUNNING):
        status = run.status
        step = "starting" if status.step is None else f"step {status.step} of {status.steps or '?'}"
        seen = duration(status.heartbeat_age_s or 0.0)
        name = f"{escape(run.row)} on {escape(run.dataset)}"
        lines.append(f"<li>{run_link(run.name)} {name}: {step}, seen {seen} before</li>")
    return f"<h3>Running</h3><ul>{''.join(lines[:SHOWN_FAILURES])}</ul>" if lines else ""


def _failures(sweep: Sweep) -> str:
    failed = [run for run in sweep.runs if run.status.state is State.FAILED]
    if not failed:
        return ""
    lines = "".join(
        f"<li>{run_link(run.name)} {escape(run.row)} on {escape(run.dataset)}: "
        f"<code>{escape(run.status.error or 'no message')}</code></li>"
        for run in failed[:SHOWN_FAILURES]
    )
    more = len(failed) - SHOWN_FAILURES
    rest = f"<p>{more} more: filter the runs by state.</p>" if more > 0 else ""
    return f"<h3>Failed jobs</h3><ul>{lines}</ul>{rest}"


def tables_section(found: Sequence[Family]) -> str:
    """The tables, under a headline for each family."""
    if not found:
        return "<p>No records yet: tables appear with the first checkpoints.</p>"
    links = "".join(f'<li><a href="#{family.key}">{escape(family.title)}</a></li>' for family in found)
    parts = [f'<nav aria-label="Tables"><ul class="contents">{links}</ul></nav>']
    for family in found:
        tables = [table_html(table, f"t-{family.key}-{i}") for i, table in enumerate(family.tables)]
        body = "".join(tables) or f'<p class="note">{escape(family.missing)}</p>'
        head = f"<summary><h3>{escape(family.title)}</h3></summary>"
        parts.append(f'<details open id="{family.key}">{head}{body}</details>')
    return "".join(parts)


def figures_section(sweep: Sweep, plots: Sequence[Any], criterion: str) -> str:
    """Charts that the page draws itself, then the sweep's figures."""
    words = CRITERION_WORDS[criterion]
    charts = (
        f"<h3>AA against WGA on test</h3><p>Checkpoints chosen by {words}; a point is a trial. Arrow keys go from "
        f'point to point, Enter opens its run.</p><div id="scatter" class="charts"></div>'
        if plots
        else ""
    )
    files = figures_html(sweep.directory) or (
        f"<p>No figures: <code>python -m domainbed.scripts.figure --help</code> names those that can be drawn; what "
        f"lies in {FOLDER}/ of the sweep's directory is shown here.</p>"
    )
    return f"{charts}<h3>From files</h3>{files}"


def runs_section(sweep: Sweep, criterion: str) -> str:
    """The frame of the list of runs, which the page's script fills page by page."""
    controls = "".join(
        f'<label>{title} <select data-key="{key}"><option value="">all</option></select></label>'
        for key, title in (("state", "State"), ("dataset", "Dataset"), ("row", "Row"))
    )
    heads = "".join(
        f'<th scope="col"><button type="button" class="sort" data-key="{key}">{title}'
        f'<span class="arrow" aria-hidden="true"></span></button></th>'
        for key, title in RUN_COLUMNS
    )
    words = CRITERION_WORDS[criterion]
    return (
        f"<p>AA and WGA on test, in percent, at each run's own checkpoint that is best by {words} (without groups, by "
        f"mean accuracy); accuracies of runs that are not done may change.</p>"
        f'<form id="run-filters" class="needs-js" aria-label="Filter runs">{controls}'
        f'<label>Text <input type="search" autocomplete="off" data-key="text"></label>'
        f'<span id="run-count" role="status"></span></form>'
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="runs-title"><table id="run-table">'
        f'<caption id="runs-title">Jobs of the sweep</caption><thead><tr>{heads}</tr></thead><tbody></tbody></table>'
        f'</div><nav class="pages needs-js" aria-label="Pages of the list of runs"><button type="button" data-go="-1">'
        f'Previous</button> <span id="run-page-number"></span> <button type="button" data-go="1">Next</button></nav>'
    )


RUN_COLUMNS = (
    ("name", "Run"),
    ("state", "State"),
    ("dataset", "Dataset"),
    ("envs", "Test envs"),
    ("row", "Row"),
    ("trial", "Trial"),
    ("draw", "Draw"),
    ("seed", "Seed"),
    ("step", "Last step"),
    ("taken", "Chosen step"),
    ("aa", "AA"),
    ("wga", "WGA"),
)


def datasets_section(cards: Sequence[Card]) -> str:
    """The datasets' cards."""
    return "".join(_card(card, f"d-{i}") for i, card in enumerate(cards)) or "<p>No job says its dataset.</p>"


def _card(card: Card, key: str) -> str:
    tables = "".join(table_html(table, f"{key}-{i}") for i, table in enumerate(card.tables))
    none = "" if card.tables else '<p class="note">No record counts groups of this dataset.</p>'
    head = f"<summary><h3>{escape(card.dataset)}</h3> <span>{card.runs} jobs</span></summary>"
    return f'<details class="card" id="{key}">{head}<pre>{escape(card.text)}</pre>{tables}{none}</details>'


def commands(sweep: Sweep, command: str) -> str:
    """How to get the tables and this page again, what was run, and with which versions."""
    collect = shlex.join(["python", "-m", "domainbed.scripts.collect_results", "--input_dir", sweep.directory])
    if sweep.listed:
        launched = (
            f"The sweep's list, {job_lists.JOBS_FILE}, has {sweep.listed} jobs; the sweep file or flags that it was "
            "launched with are not kept in the directory. The command of each job stands on its page."
        )
    else:
        launched = f"The directory has no {job_lists.JOBS_FILE}; the command of each job stands on its page."
    versions = "".join(
        f"<tr><th scope='row'>{escape(package)}</th><td>"
        f"{escape(', '.join(f'{version} ({n} runs)' for version, n in counts.most_common()))}</td></tr>"
        for package, counts in sorted(sweep.versions().items())
    )
    made_with = f"domainbed {domainbed.__version__}, Python {platform.python_version()} on {sys.platform}"
    return (
        f"<p>All tables as text, and in files of the sweep's directory:</p><pre><code>{escape(collect)}</code></pre>"
        f"<p>This page again:</p><pre><code>{escape(command)}</code></pre><p>{escape(launched)}</p>"
        f"<p>This page was made with {escape(made_with)} from {escape(records.RESULTS_FILE)} of the runs.</p>"
        + (
            f'<div class="scroll" role="region" tabindex="0" aria-labelledby="versions-title"><table><caption '
            f'id="versions-title">Versions that the runs logged</caption><tbody>{versions}</tbody></table></div>'
            if versions
            else "<p>No run logged its versions.</p>"
        )
    )
