"""What is checked of a sweep's jobs before any is launched, so that a slip costs seconds and not a night."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from domainbed import messages, registry
from domainbed.jobs import Job
from domainbed.rows import Row, meeting, row_names, runs
from domainbed.scripts import BadInput, torch_process

_SEEDS = ("seed", "trial_seed", "test_envs", "output_dir")  # whatever they are, a job can run or can't


def check(jobs: Sequence[Job]) -> None:
    """Checks the directories, names and hparams of jobs, in this process and in one other, which has torch.

    Raises:
        BadInput: lists what is wrong with which rows; or the checks themselves failed.
    """
    kinds = list(_kinds([job.train_args for job in jobs]).values())
    if not kinds:
        return
    if problems := missing_directories(kinds):
        raise BadInput(messages.listed("nothing was launched:", problems))
    try:
        found = torch_process.ask("domainbed.scripts.check_jobs", kinds)
    except torch_process.Failed as error:
        raise BadInput(f"nothing was launched, for the jobs could not be checked: {error}") from error
    if problems := by_problem(kinds, found):
        raise BadInput(messages.listed("nothing was launched, for some jobs can't run:", problems))


def _kinds(args_list: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """One job's arguments for each combination of those that decide whether a job can run."""
    found: dict[str, Mapping[str, Any]] = {}
    for args in args_list:
        settings = {key: value for key, value in args.items() if key not in _SEEDS}
        settings["hparams_seed"] = args["hparams_seed"] != 0
        found.setdefault(json.dumps(settings, sort_keys=True), args)
    return found


def missing_directories(args_list: Sequence[Mapping[str, Any]]) -> list[str]:
    """A message for each directory that is to be read and does not exist."""
    found = []
    for args in args_list:
        reads = registry.attribute("datasets", args["dataset"], "NEEDS_DATA_DIR", False)
        for flag in ("mask_dir", *(["data_dir"] if reads else [])):
            path = args.get(flag)
            if path is not None and not os.path.isdir(path):
                found.append(f"--{flag} {path} is no directory; name the one that holds the files")
    return list(dict.fromkeys(found))


def by_problem(args_list: Sequence[Mapping[str, Any]], problems: Sequence[str | None]) -> list[str]:
    """A message for each problem: a row and dataset that has it, how many others have, and what it is."""
    names = row_names(meeting(runs({"args": args} for args in args_list)).values())
    places: dict[str, list[str]] = {}
    for args, problem in zip(args_list, problems, strict=True):
        if problem:
            places.setdefault(problem, []).append(f"{names[Row.of(args)]} on {args['dataset']}")
    found = []
    for problem, several in places.items():
        others = len(set(several)) - 1
        found.append(f"{several[0]}{f' and {others} more' if others else ''}: {problem}")
    return found
