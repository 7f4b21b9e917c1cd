"""Loading a sweep's records and grouping them as DomainBed's tables need them."""

import os
from typing import Any

from domainbed import records as record_files
from domainbed.lib.query import Q

GroupKey = tuple[Any, str, str, int]


def load_records(path: str | os.PathLike[str]) -> Q:
    """All records of the jobs directly under a sweep's directory, jobs in name order.

    A line that holds no record (torn by a kill) is skipped with a warning.
    """
    return Q(record_files.iterate(path))


def get_grouped_records(records: Q) -> Q:
    """The records by trial seed, dataset, algorithm and test environment.

    A record with several test environments stands in the group of each, which leave-one-out selection needs.

    Returns:
        Q of dicts with the keys trial_seed, dataset, algorithm, test_env, and records (a Q), sorted by the first four.
    """
    groups: dict[GroupKey, list[Any]] = {}
    for record in records:
        args = record["args"]
        for test_env in args["test_envs"]:
            key = (args["trial_seed"], args["dataset"], args["algorithm"], test_env)
            groups.setdefault(key, []).append(record)
    names = ("trial_seed", "dataset", "algorithm", "test_env")
    return Q({**dict(zip(names, key, strict=True)), "records": Q(groups[key])} for key in sorted(groups))
