"""The launcher for SLURM clusters, through submitit: arrays of tasks that train, save when they are told to, and go on.

A sweep's ``slurm`` directory holds what submitit writes, the tasks' logs and a ledger of what was submitted. All of
it is a hint about what SLURM still has; what became of a job is read from the job's own directory. So a launcher may
end as soon as it has submitted, and launching again submits what is neither over nor in SLURM's hands.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from domainbed import records, states
from domainbed.commands import Command
from domainbed.slurm_tasks import TrainTask

FOLDER = "slurm"
LEDGER_FILE = "submitted.jsonl"
DEFAULT_MINUTES = 240  # a task that reaches its limit is put back into the queue and goes on
SIGNAL_DELAY_S = 90  # from the warning to the end of the time limit
MAX_TIMEOUTS = 1_000_000  # a task may reach its limit as often as it needs to
OURS = ("array", "error", "job-name", "no-requeue", "open-mode", "output", "requeue", "signal", "time")
_QUEUE_FIELDS = ("%i", "%T", "%r", "%j")  # 12_3, RUNNING, why it waits, the array's name


class SlurmMissing(RuntimeError):
    """SLURM can't be used: its commands are missing, do not answer, or refuse what they are asked for."""


def slurm_launcher(
    commands: Sequence[Command],
    *,
    max_parallel: int | None = None,
    jobs_per_task: int = 1,
    retries: int = 1,
    slurm_partition: str | None = None,
    slurm_time: str | None = None,
    slurm_mem_gb: float | None = None,
    slurm_cpus: int | None = None,
    slurm_gpus: int | None = None,
    slurm_args: Sequence[str] = (),
) -> None:
    """Submits the commands of one sweep as job arrays, but not what SLURM already has; does not wait for them.

    Args:
        commands: of train, with their directories.
        max_parallel: tasks at a time; default: as many as the cluster runs.
        jobs_per_task: commands that a task does one after the other, for jobs that are short.
        retries: how often a task tries a failed job again.
        slurm_partition, slurm_mem_gb, slurm_cpus, slurm_gpus: of a task; the cluster's default where None.
        slurm_time: a task's limit as SLURM writes it; default: 4 hours.
        slurm_args: further options of sbatch, ``"KEY=VALUE"``, or ``"KEY="`` for one without a value.

    Raises:
        ValueError: a time or an option that is not in that form, or commands of several sweeps.
        ImportError: there is no submitit.
        SlurmMissing: there is no SLURM, or it refuses.
    """
    limit, more = minutes(slurm_time) if slurm_time else DEFAULT_MINUTES, sbatch_flags(slurm_args)
    check_installed()
    sweep, delay_s = sweep_directory(commands), min(SIGNAL_DELAY_S, limit * 60 // 3)
    options = {
        "timeout_min": limit,
        "slurm_signal_delay_s": delay_s,
        "mem_gb": slurm_mem_gb,
        "cpus_per_task": slurm_cpus,
        "gpus_per_node": slurm_gpus or None,
        "slurm_partition": slurm_partition,
    }
    with _one_at_a_time(make_folder(sweep)):
        fresh = [(command.argv, command.output_dir) for command in _not_in_slurm(commands, sweep)]
        tasks = [TrainTask(jobs, retries, slurm_cpus or 1, 0.8 * delay_s) for jobs in chunks(fresh, jobs_per_task)]
        ids = submit(sweep, tasks, options, {"requeue": True} | more, max_parallel)
    if ids:
        _say_submitted(sweep, len(fresh), len(tasks), ids)


def _say_submitted(sweep: str, jobs: int, tasks: int, ids: Sequence[str]) -> None:
    script = "python -m domainbed.scripts.sweep"
    print(f"Submitted {jobs} jobs as {tasks} tasks of array(s) {', '.join(ids)}.")
    print(f"`{script} status --output_dir {sweep}` shows them, `{script} cancel --output_dir {sweep}` ends them.")


def _not_in_slurm(commands: Sequence[Command], sweep: str) -> list[Command]:
    """The commands that no task is going to run; says how many others there are. A failed job's task is past it."""
    queue = read_queue(sweep)
    taken = {name for entry in queue for name in entry.names if not Path(sweep, name, states.FAILED_FILE).exists()}
    fresh = [command for command in commands if os.path.basename(command.output_dir) not in taken]
    if len(fresh) < len(commands):
        print(f"Left {len(commands) - len(fresh)} jobs alone that SLURM has already.")
    show_held(queue)
    return fresh


def cancel(sweep: str | os.PathLike[str]) -> list[str]:
    """Takes from SLURM whatever it still has of a sweep; returns the ids of the arrays."""
    ids = sorted({entry.job_id.partition("_")[0] for entry in read_queue(sweep)}, key=int)
    if ids:
        _output("scancel", *ids)
    return ids


def minutes(text: str) -> int:
    """A time limit as SLURM writes it, in minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"--slurm_time {text} is no time; write minutes, or [D-]HH:MM:SS")
    days, *fields = match.groups()
    numbers = [int(field) for field in fields if field is not None]
    first = 3600 if days is not None or len(numbers) == 3 else 60
    seconds = 86400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, (first, first / 60, 1), strict=False))
    if not seconds:
        raise ValueError(f"--slurm_time {text} is no limit; write minutes, or [D-]HH:MM:SS")
    return int(-(-seconds // 60))


def sbatch_flags(words: Sequence[str]) -> dict[str, str | bool]:
    """Further options of sbatch from ``KEY=VALUE`` words; an empty value makes a flag.

    Raises:
        ValueError: a word of another form, or an option that is the launcher's own.
    """
    flags: dict[str, str | bool] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().lstrip("-").replace("_", "-")
        if not equals or not key:
            raise ValueError(f"--slurm_args {word} is not KEY=VALUE, as account=lab; exclusive= is a flag")
        if key in OURS:
            raise ValueError(f"--slurm_args {word}: the launcher sets {key} itself; leave it out (or see --slurm_time)")
        flags[key] = value or True
    return flags


def check_installed() -> None:
    """Raises SlurmMissing without SLURM's commands, and ImportError without submitit."""
    for command in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(command) is None:
            raise SlurmMissing(f"{command} is not found: launch on a machine from which jobs are submitted to SLURM")
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise ImportError("the slurm launcher needs submitit: pip install 'domainbed-ex2l[slurm]'") from error


def sweep_directory(commands: Sequence[Command]) -> str:
    """The directory that holds the directories of all commands.

    Raises:
        ValueError: there are several.
    """
    found = sorted({os.path.dirname(os.path.abspath(command.output_dir)) for command in commands})
    if len(found) != 1:
        raise ValueError(f"the slurm launcher submits one sweep at a time; got jobs of {', '.join(found) or 'none'}")
    return found[0]


def make_folder(sweep: str | os.PathLike[str]) -> Path:
    """The engine's directory; nobody else may write the pickles that it holds, which are code."""
    folder = Path(sweep, FOLDER)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other launch reads the ledger and submits."""
    with open(folder / "lock", "a", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def read_ledger(sweep: str | os.PathLike[str]) -> dict[str, list[list[str]]]:
    """The jobs of each task of each array that was to be submitted, by the array's name; torn lines are skipped."""
    path = Path(sweep, FOLDER, LEDGER_FILE)
    arrays = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            arrays[entry["array"]] = entry["tasks"]
        except (ValueError, KeyError, TypeError):
            continue
    return arrays


def note(sweep: str | os.PathLike[str], array: str, tasks: Sequence[Sequence[str]]) -> None:
    """Appends to the ledger which jobs an array has; done before it is submitted, so that none goes unnoticed."""
    records.append(Path(sweep, FOLDER, LEDGER_FILE), {"array": array, "tasks": [list(names) for names in tasks]})


class Queued(NamedTuple):
    """A task that SLURM has: its id (``12_3``), its state, why it waits, and its jobs."""

    job_id: str
    state: str
    reason: str
    names: list[str]


def read_queue(sweep: str | os.PathLike[str]) -> list[Queued]:
    """The sweep's tasks that SLURM has, waiting or running.

    Raises:
        SlurmMissing: squeue is missing or doesn't answer.
    """
    arrays = read_ledger(sweep)
    if not arrays:
        return []
    return parse_queue(_output("squeue", "-h", "-r", "-n", ",".join(arrays), "-o", "|".join(_QUEUE_FIELDS)), arrays)


def parse_queue(text: str, arrays: Mapping[str, Sequence[Sequence[str]]]) -> list[Queued]:
    """squeue's lines, with the jobs that the ledger knows of each task."""
    found = []
    for line in text.splitlines():
        job_id, state, reason, array = line.strip().split("|", 3)
        tasks, index = arrays[array], int(job_id.partition("_")[2] or 0)  # an array of one task is no array
        found.append(Queued(job_id, state, reason, list(tasks[index]) if index < len(tasks) else []))
    return found


def show_held(queue: Sequence[Queued]) -> None:
    """Says which tasks wait for a person, as SLURM lets them after a start that failed."""
    if held := [entry for entry in queue if "held" in entry.reason.lower()]:
        ids = ",".join(entry.job_id for entry in held)
        print(f"{len(held)} tasks are held ({held[0].reason}) until somebody says: scontrol release {ids}")


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The items in order, ``size`` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def max_array_size() -> int:
    """How many tasks an array may have here."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _output("scontrol", "show", "config"), re.MULTILINE)
    return max(int(match.group(1)), 1) if match else 1001


def array_name(sweep: str | os.PathLike[str]) -> str:
    """A new name for an array, by which squeue finds it; starts with the hash of the sweep's path."""
    return f"domainbed-{hashlib.md5(os.path.realpath(sweep).encode()).hexdigest()[:8]}-{uuid.uuid4().hex[:8]}"


def submit(
    sweep: str,
    tasks: Sequence[TrainTask],
    options: Mapping[str, Any],
    more: Mapping[str, str | bool],
    max_parallel: int | None,
) -> list[str]:
    """Submits the tasks as arrays and returns their ids; with ``max_parallel`` one array begins when another is over.

    Raises:
        SlurmMissing: SLURM refuses; what it took before is named.
    """
    import submitit

    ids: list[str] = []
    for some in chunks(tasks, max_array_size()) if tasks else ():
        for name in (name for task in some for name in task.names):
            Path(sweep, name, states.FAILED_FILE).unlink(missing_ok=True)  # from here on it speaks of this submission
        name, after = array_name(sweep), {}
        note(sweep, name, [task.names for task in some])
        if max_parallel and ids:
            after = {"dependency": f"afterany:{ids[-1]}"}
        executor = submitit.AutoExecutor(Path(sweep, FOLDER), cluster="slurm", slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(
            **options,
            name=name,
            slurm_array_parallelism=max_parallel or len(some),
            slurm_additional_parameters={**more, **after},
        )
        try:
            with redirect_stderr(io.StringIO()):  # submitit prints what it raises
                ids.append(executor.submit_array(list(some))[0].job_id.partition("_")[0])
        except submitit.core.utils.FailedJobError as error:
            taken = f" (it took array {', '.join(ids)} before)" if ids else ""
            raise SlurmMissing(f"sbatch refused{taken}: {str(error).strip()}") from error
    return ids


def _output(*argv: str) -> str:
    """What one of SLURM's commands prints.

    Raises:
        SlurmMissing: it is missing, fails, or takes minutes.
    """
    try:
        run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmMissing(f"{argv[0]} does not answer: {error}") from error
    if run.returncode:
        raise SlurmMissing(f"{argv[0]} failed: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout
