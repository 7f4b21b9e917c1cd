"""A sweep's grid as jobs: what each one trains, the directory it is known by, and how far it has come."""

import functools
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from domainbed import claims, records, registry, states
from domainbed.commands import train_command
from domainbed.interruption import EXIT_PREEMPTED
from domainbed.seeding import seed_hash
from domainbed.states import State, Status
from domainbed.sweep_rows import FULL_BUDGET, Budget, SweepRow, budget_args, with_controls

logger = logging.getLogger(__name__)

_ERROR = re.compile(r"(error|[A-Za-z_.]*(Error|BadInput)): ")  # as scripts and tracebacks begin them

# Arguments of train that DomainBed's sweeps lack; a job carries one only where it is given.
EXTRAS = (
    "label", "checkpoint_freq", "precision", "eval_splits", "keep_best", "skip_model_save", "input_pipeline",
    "confounders", "annotation_budget", "validation_budget", "ranges", "epochs", "explain", "mask_dir",
    "uda_holdout_fraction",
)  # fmt: skip
_SHOWN = (
    "dataset", "algorithm", "test_envs", "hparams_seed", "partition", "label", "annotation_budget", "validation_budget",
)  # fmt: skip
BY_CONFOUNDER = ("group", "confounder", "group_subset")  # as partitions has it, which takes long to import
_DELETING = 16  # at a time: to be sure that another machine's process is dead takes half a minute
# Two answers to one question.
EXCLUSIVE = (
    ("steps", "epochs"), ("test_envs_list", "official_test_envs"), ("budgets", "annotation_budget"),
    ("budgets", "validation_budget"),
)  # fmt: skip


def all_test_env_combinations(n: int) -> list[list[int]]:
    """Every environment alone, each followed by its pairs with later ones: [0], [0, 1], ..., [1], [1, 2], ...

    Raises:
        ValueError: fewer than three environments, so that a pair would leave none to train on.
    """
    if n < 3:
        raise ValueError(f"pairs of test environments need at least 3 environments, got {n}; pass --single_test_envs")
    return [envs for i in range(n) for envs in ([i], *([i, j] for j in range(i + 1, n)))]


def dataset_test_envs(
    dataset: str,
    single_test_envs: bool,
    test_envs_list: Sequence[Sequence[int]] | None = None,
    official_test_envs: bool = False,
) -> list[list[int]]:
    """The test environments of a dataset's jobs, one list a job.

    ``test_envs_list`` wins; else a dataset that DomainBed lacks takes its own ``TEST_ENVS``, and so does every other
    that has some if ``official_test_envs`` are asked for; else they are enumerated, of two environments without pairs.

    Raises:
        NotImplementedError: no such dataset.
        ValueError: the dataset names no environments, too few, or lacks one that is asked for.
    """
    n = len(registry.attribute("datasets", dataset, "ENVIRONMENTS") or ())
    if n == 0:
        raise ValueError(f"{dataset} names no environments; give the class ENVIRONMENTS, a tuple of their names")
    official = registry.attribute("datasets", dataset, "TEST_ENVS")
    if test_envs_list is not None:
        combinations = [list(envs) for envs in test_envs_list]
    elif official and (official_test_envs or dataset not in registry.order("datasets")):  # keeps DomainBed's sweeps
        combinations = [list(official)]
    elif single_test_envs or n < 3:
        combinations = [[i] for i in range(n)]
        if not single_test_envs:
            logger.warning("%s: pairs of test environments would leave none to train on; single ones only", dataset)
    else:
        combinations = all_test_env_combinations(n)
    for envs in combinations:
        _check_test_envs(dataset, envs, n)
    return combinations


def _check_test_envs(dataset: str, envs: Sequence[int], n: int) -> None:
    if n == 1:
        raise ValueError(f"{dataset} has one environment, so that none is left to train on; give it a second one")
    if len(set(envs) & set(range(n))) != len(envs) or not 0 < len(envs) < n:
        raise ValueError(
            f"{dataset}: test environments {envs} are not possible; name some, not all, of 0 to {n - 1}, each once"
        )
    validation = registry.attribute("datasets", dataset, "VALIDATION_ENVS", ())
    official = registry.attribute("datasets", dataset, "TEST_ENVS") if validation else ()
    if set(envs) & set(validation) or not set(official) <= set(envs):
        raise ValueError(
            f"{dataset}: test environments {envs} are not possible; they must contain the official test set "
            f"{list(official)} and none of the validation set {list(validation)}"
        )


def _trainable(row: Mapping[str, Any], dataset: str, envs: Sequence[int]) -> bool:
    """Whether a job can run: warns of rows that need confounders, masks or more environments than the dataset has.

    DomainBed's pairs of test environments leave a single one to train on where there are three.
    """
    default = registry.attribute("algorithms", row["algorithm"], "PARTITION", "environment")
    least = registry.attribute("algorithms", row["algorithm"], "MIN_PARTS", 1)
    grouped = row.get("partition", default) in BY_CONFOUNDER
    budgeted = not {row.get("annotation_budget", 1), row.get("validation_budget", 1)} <= {1}
    needs = grouped or budgeted or registry.attribute("algorithms", row["algorithm"], "NEEDS_CONFOUNDERS", False)
    if needs and not (row.get("confounders") or registry.attribute("datasets", dataset, "CONFOUNDERS")):
        logger.warning("left out: %s on %s, which knows no confounder", row["algorithm"], dataset)
        return False
    masked = row.get("mask_dir") or registry.attribute("datasets", dataset, "HAS_MASKS", False)
    if registry.attribute("algorithms", row["algorithm"], "NEEDS_MASKS", False) and not masked:
        logger.warning("left out: %s on %s, which has no masks", row["algorithm"], dataset)
        return False
    n = len(registry.attribute("datasets", dataset, "ENVIRONMENTS"))
    left = n - len({*envs, *registry.attribute("datasets", dataset, "VALIDATION_ENVS", ())})
    if row.get("partition", default) != "environment" or left >= least:
        return True
    where = f"{dataset}, test environments {envs}"
    logger.warning("left out: %s on %s, which leaves %d of %d to train on", row["algorithm"], where, left, least)
    return False


def _check_data_dir(data_dir: str | None, dataset_names: Sequence[str]) -> None:
    needy = [name for name in dataset_names if registry.attribute("datasets", name, "NEEDS_DATA_DIR", False)]
    if data_dir is None and needy:
        names = ", ".join(needy) + (" reads" if len(needy) == 1 else " read")
        raise ValueError(f"--data_dir is required: {names} files; name the directory that holds them")


def given(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say something: neither None nor False."""
    return {key: value for key, value in args.items() if value is not None and value is not False}


def check_exclusive(args: Mapping[str, Any]) -> None:
    """Raises ValueError if two arguments answer the same question."""
    for one, other in EXCLUSIVE:
        if one in args and other in args:
            raise ValueError(f"--{one} and --{other} exclude each other; leave one of them out")


def make_args_list(
    n_trials: int,
    dataset_names: Sequence[str],
    algorithms: Sequence[str],
    n_hparams_from: int,
    n_hparams: int,
    steps: int | None,
    data_dir: str | None,
    task: str,
    holdout_fraction: float,
    single_test_envs: bool,
    hparams: str | None,
    *,
    rows: Sequence[SweepRow] = (),
    test_envs_list: Sequence[Sequence[int]] | None = None,
    official_test_envs: bool = False,
    controls: bool = False,
    budgets: Sequence[Budget] | None = None,
    **extras: Any,
) -> list[dict[str, Any]]:
    """The arguments of every job, in DomainBed's order: trial, dataset, row, test environments, hparams seed.

    Args:
        n_trials: trial seeds are 0 to n_trials - 1.
        algorithms: ``"NAME"`` or ``"NAME:partition"``.
        n_hparams_from, n_hparams: hparams seeds are n_hparams_from to n_hparams - 1; 0 is the defaults.
        steps, hparams: left out of the arguments where None, as are ``data_dir`` and the extras.
        hparams: JSON object, for all jobs.
        rows: follow ``algorithms``.
        test_envs_list: one list a job, for all datasets; None: see ``dataset_test_envs``.
        official_test_envs: see ``dataset_test_envs``.
        controls: each row is followed by its control (``sweep_rows.with_controls``).
        budgets: shares of training and validation images with a known confounder; each row is there once for each.
        extras: any of ``EXTRAS``.

    Raises:
        NotImplementedError: no such dataset, algorithm or partition.
        ValueError: anything else that the jobs could not run with.
        TypeError: an extra that train does not have.
    """
    if unknown := extras.keys() - set(EXTRAS):
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}; known: {', '.join(EXTRAS)}")
    shared = given({"steps": steps, "data_dir": data_dir, **extras})
    choices = {"test_envs_list": test_envs_list, "official_test_envs": official_test_envs}
    check_exclusive(shared | given(choices | {"budgets": budgets or any(row.budgets for row in rows)}))
    test_envs = {
        name: dataset_test_envs(name, single_test_envs, test_envs_list, official_test_envs) for name in dataset_names
    }
    asked = [*map(SweepRow.parse, algorithms), *rows]
    row_args = {name: _row_args(asked, name, controls, hparams, budgets, extras) for name in dataset_names}
    _check_data_dir(data_dir, dataset_names)
    shared |= {"task": task, "holdout_fraction": holdout_fraction}
    cells = {
        name: [
            (shared | args, [envs for envs in test_envs[name] if _trainable(shared | args, name, envs)])
            for args in row_args[name]
        ]
        for name in dataset_names
    }
    return [
        _job_args(args, dataset, envs, trial_seed, hparams_seed)
        for trial_seed in range(n_trials)
        for dataset in dataset_names
        for args, several in cells[dataset]
        for envs in several
        for hparams_seed in range(n_hparams_from, n_hparams)
    ]


def _row_args(
    rows: Sequence[SweepRow],
    dataset: str,
    controls: bool,
    hparams: str | None,
    budgets: Sequence[Budget] | None,
    extras: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Each row's own arguments on a dataset, controls among them, for each of its budgets."""
    there = with_controls([row.on_dataset(dataset) for row in rows], controls, hparams, extras.get("label"))
    return [
        row.train_args(hparams, extras.get("ranges")) | budget_args(budget)
        for row in there
        for budget in row.budgets or budgets or [FULL_BUDGET]
    ]


def _job_args(
    args: dict[str, Any], dataset: str, test_envs: list[int], trial_seed: int, hparams_seed: int
) -> dict[str, Any]:
    """One job's arguments. The seed leaves out what tells rows apart, so that rows are compared on equal draws."""
    seed = seed_hash(dataset, args["algorithm"], test_envs, hparams_seed, trial_seed)
    seeds = {"trial_seed": trial_seed, "hparams_seed": hparams_seed, "seed": seed}
    return args | {"dataset": dataset, "test_envs": list(test_envs)} | seeds


_hashed_text = json.JSONEncoder(sort_keys=True).encode  # what json.dumps would make anew for each of 20,000 jobs


def directory_name(train_args: Mapping[str, Any]) -> str:
    """DomainBed's name of a job's directory, by which sweeps find each other's jobs."""
    return hashlib.md5(_hashed_text(dict(train_args)).encode(), usedforsecurity=False).hexdigest()


class Outcome(NamedTuple):
    """What became of launched jobs."""

    done: list["Job"]
    failed: list["Job"]
    elsewhere: list["Job"]  # another process had taken them
    stopped: list["Job"]  # saved their state and ended, as they were told to


class Found(NamedTuple):
    """A job's directory as it was found."""

    name: str
    status: Status | None  # None: there is none


class Job:
    """One run of train, known by the hash of its arguments.

    Attributes:
        output_dir: the job's directory under the sweep's.
        train_args: its arguments, output_dir included.
        status: how far it has come, as found when the object was made.
        state: the same in DomainBed's words: NOT_LAUNCHED (no directory), INCOMPLETE or DONE.
    """

    NOT_LAUNCHED = "Not launched"
    INCOMPLETE = "Incomplete"
    DONE = "Done"

    def __init__(
        self,
        train_args: Mapping[str, Any],
        sweep_output_dir: str,
        more_words: Sequence[str] = (),
        found: Found | None = None,
    ):
        """Looks for the job's directory, unless somebody has, as one does for many at once."""
        if found is None:
            [found] = look(sweep_output_dir, [directory_name(train_args)])
        self.output_dir = os.path.join(sweep_output_dir, found.name)
        self.train_args = {key: list(v) if isinstance(v, list) else v for key, v in train_args.items()}
        self.train_args["output_dir"] = self.output_dir
        self.status = found.status or states.QUEUED
        self._more_words = more_words
        if self.status.state is State.DONE:
            self.state = Job.DONE
        else:
            self.state = Job.INCOMPLETE if found.status else Job.NOT_LAUNCHED

    @property
    def name(self) -> str:
        """Its directory's, the hash of its arguments."""
        return os.path.basename(self.output_dir)

    @functools.cached_property
    def command_str(self) -> str:
        """The shell command that runs it, a ``commands.Command``; made when it is asked for."""
        return train_command(self.train_args, self._more_words)

    def __str__(self) -> str:
        facts = tuple([self.train_args[key] for key in _SHOWN if key in self.train_args])
        return f"{self.state}: {self.output_dir} {facts}"

    def last_error(self) -> str:
        """Why it failed: as recorded, or else the last error or line that the job wrote to its stderr."""
        if error := states.read(self.output_dir).error:
            return error
        if os.path.isfile(self.output_dir):
            return "a file is where the job's directory should be; remove it"
        path = Path(self.output_dir, "err.txt")
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line.removeprefix("domainbed.scripts.BadInput: ") for line in lines if _ERROR.match(line)]
        return (errors or lines or ["(err.txt says nothing)"])[-1]

    @staticmethod
    def launch(jobs: Sequence["Job"], launcher_fn: Callable[[list[str]], Any]) -> Outcome | None:
        """Hands the jobs' commands, shuffled, to the launcher; a job's directory is made when it runs.

        Returns:
            What became of them; None where the launcher returns no exit codes, as those that only submit.
        """
        print("Launching...", flush=True)  # the launcher may take days
        jobs = list(jobs)
        random.shuffle(jobs)  # mixes long and short jobs
        codes = launcher_fn([job.command_str for job in jobs])
        print(f"Launched {len(jobs)} jobs!")
        if not isinstance(codes, list) or [type(code) for code in codes] != [int] * len(jobs):
            return None
        outcome = Outcome([], [], [], [])
        for job, code in zip(jobs, codes, strict=True):
            outcome[job._became(code)].append(job)
        return outcome

    def _became(self, code: int) -> int:
        """The field of ``Outcome`` that an ended job belongs to: by its directory, or else by its exit code."""
        told = states.code_of(self.output_dir)
        if told == EXIT_PREEMPTED:
            told = code or states.EXIT_FAILED
        return {0: 0, claims.EXIT_LOCKED: 2, EXIT_PREEMPTED: 3}.get(told, 1)

    @staticmethod
    def delete(jobs: Sequence["Job"]) -> int:
        """Removes the jobs' directories, but not of one that runs or has been completed; returns how many went."""
        print("Deleting...")
        with ThreadPoolExecutor(_DELETING) as pool:
            deleted = sum(pool.map(Job._delete, jobs))
        print(f"Deleted {deleted} jobs!")
        return deleted

    def _delete(self) -> bool:
        try:
            with claims.claim(self.output_dir):
                if os.path.exists(os.path.join(self.output_dir, records.DONE_FILE)):
                    return False
                shutil.rmtree(self.output_dir)
                return True
        except (claims.RunLocked, FileNotFoundError):  # gone: somebody else deletes too
            return False


def look(sweep_output_dir: str, names: Sequence[str]) -> Iterator[Found]:
    """How far the jobs of these names have come, from one look at the sweep's directory."""
    statuses: dict[str, Status] = {}
    if os.path.isdir(sweep_output_dir):
        there = set(os.listdir(sweep_output_dir))
        statuses = states.scan(sweep_output_dir, [name for name in names if name in there])
    return (Found(name, statuses.get(name)) for name in names)


def make_jobs(
    args_list: Sequence[Mapping[str, Any]], sweep_output_dir: str, more_words: Sequence[str] = ()
) -> list[Job]:
    """The jobs of a sweep; ``more_words`` follow each one's arguments in its command.

    Raises:
        ValueError: two jobs are the same run.
    """
    every = look(sweep_output_dir, [directory_name(args) for args in args_list])
    jobs: dict[str, Job] = {}
    for args, found in zip(args_list, every, strict=True):
        job = Job(args, sweep_output_dir, more_words, found)
        if found.name in jobs:
            raise ValueError(f"two jobs are the same run: {job}; name each dataset and each row once")
        jobs[found.name] = job
    return list(jobs.values())
