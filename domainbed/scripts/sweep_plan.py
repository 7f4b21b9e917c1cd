"""The verb plan: what a sweep will take, before anything of it is launched."""

import argparse
from collections.abc import Sequence
from typing import Any

from domainbed import machine, plans
from domainbed.commands import thread_limits
from domainbed.jobs import Job
from domainbed.scripts import BadInput, torch_process
from domainbed.scripts.sweep_checks import missing_directories

_DRAWS = 20  # of a kind's hparams that are looked at, at most


def plan(args: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Prints jobs, steps and hours by row and dataset; nothing is written.

    Args:
        args: the sweep's; read are ``workers``, ``threads`` and ``no_calibration``.

    Raises:
        BadInput: the process that times jobs failed.
    """
    several = plans.kinds([job.train_args for job in jobs], [job.state == Job.DONE for job in jobs])
    threads = 1 if args.threads is None else args.threads
    where = None if args.no_calibration else calibrate([kind for kind in several if kind.to_do], threads)
    print(plans.table(several))
    print(plans.summary(several, args.workers or max(1, machine.cores() // max(1, threads)), where), end="")
    return 0


def calibrate(several: Sequence[plans.Kind], threads: int) -> str:
    """Sets the timing of each kind, or the reason why it has none; returns what they were timed on, in words.

    Raises:
        BadInput: the process that times them failed.
    """
    for kind in several:
        kind.reason = "; ".join(missing_directories([kind.args]))
    several = [kind for kind in several if not kind.reason]
    if not several:
        return ""
    question = {"kinds": [_question(kind, name) for kind, name in zip(several, plans.names(several), strict=True)]}
    limits = thread_limits(threads)
    try:
        found = torch_process.ask("domainbed.scripts.calibrate", question, limits)
    except torch_process.Failed as error:
        raise BadInput(f"the jobs could not be timed: {error}; --no_calibration plans without hours") from error
    for kind, values in zip(several, found["kinds"], strict=True):
        if "reason" in values:
            kind.reason = values["reason"]
        else:
            kind.timing = plans.Timing(**values)
    limited = f", {threads} CPU thread{'s' * (threads > 1)} a job" if threads else ""
    return f"{found['device']}{limited}; the start of Python and torch, {found['import_s']:.1f} s a job, comes on top"


def _question(kind: plans.Kind, name: str) -> dict[str, Any]:
    draws = list(kind.draws.values())
    some = draws[:: -(-len(draws) // _DRAWS)]  # spread evenly
    return {"name": f"{name} on {kind.args['dataset']}", "draws": some}
