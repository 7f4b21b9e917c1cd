"""The sweep script's status: a table of how far the jobs are, read from their directories while they run.

``--json`` prints one JSON object with these keys:

    sweep           the sweep's directory
    time            unix seconds of the look
    jobs            their number
    counts          {"queued", "running", "preempted", "failed", "done"}: numbers of jobs
    rows            list of {"row", "dataset", "jobs", "counts"}
    running         list of {"directory", "row", "dataset", "host", "pid", "heartbeat_age_s", "step", "steps",
                    "attempt"}, longest silent first
    failures        list of {"directory", "row", "dataset", "error", "attempt", "time"}, newest first
    jobs_per_hour   over the recent completions, or null
    left_s          seconds until all are done at that rate, or null where nothing runs

A job's directory lies in the sweep's and is named by a hash. A row is "ALGORITHM", "ALGORITHM:partition" or a label.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from domainbed import job_lists, records, states, status_tables
from domainbed.job_lists import Listed
from domainbed.scripts import bad_input
from domainbed.scripts.sweep_jobs import check_output_dir, no_collections, sweep_jobs
from domainbed.states import QUEUED, Status
from domainbed.status_tables import Overview

_CLEAR = "\x1b[H\x1b[2J"
_HASH = re.compile(r"[0-9a-f]{32}")


def show(args: argparse.Namespace) -> int:
    """Prints the status once, or again and again until all jobs are done or failed."""
    while True:
        found = look(args)
        _print(found, args)
        if args.watch is None or found.is_over:
            return 0
        try:
            time.sleep(args.watch)
        except KeyboardInterrupt:
            return 130


@no_collections()
def look(args: argparse.Namespace) -> Overview:
    """How far the jobs are that file and flags mean; without any, those of the sweep's directory.

    Raises:
        BadInput: there is no such directory.
    """
    now = time.time()
    if args.names_jobs:
        jobs = sweep_jobs(args)
        statuses = {job.name: job.status for job in jobs}
        return status_tables.overview(map(job_lists.listed, jobs), statuses, now)
    with bad_input():
        check_output_dir(args.output_dir)
        if not os.path.isdir(args.output_dir):
            raise FileNotFoundError(f"--output_dir {args.output_dir} does not exist; name the directory of a sweep")
        statuses = states.scan(args.output_dir)
        known = job_lists.read(args.output_dir)
        return status_tables.overview([*known, *_unlisted(args.output_dir, known, statuses)], statuses, now)


def _unlisted(sweep_dir: str, known: Collection[Listed], statuses: Mapping[str, Status]) -> list[Listed]:
    """The runs that are not on the sweep's list, as DomainBed's are not."""
    names = statuses.keys() - {job.name for job in known}
    runs = [name for name in sorted(names) if statuses[name] is not QUEUED or _HASH.fullmatch(name)]
    return [Listed(name, _first_args(Path(sweep_dir, name, records.RESULTS_FILE))) for name in runs]


def _first_args(path: Path) -> dict[str, object]:
    """The arguments in a run's first record; none where there is no legible one."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            args = json.loads(file.readline())["args"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return args if isinstance(args, dict) else {}


def _print(found: Overview, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(status_tables.as_json(found, args.output_dir)), flush=True)
        return
    clear = _CLEAR if args.watch is not None and sys.stdout.isatty() else ""
    print(clear + status_tables.as_text(found), end="", flush=True)
