"""Ways to run a list of shell commands: on this machine, on its GPUs, on a cluster, or not at all.

A launcher takes the list of commands. It may take options as keyword-only parameters, and may return the commands'
exit codes in their order. ``register`` adds a further one, from a plugin too.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from domainbed import machine, messages, registry
from domainbed.commands import thread_limits
from domainbed.pool import Pool, Unavailable
from domainbed.slurm import slurm_launcher

Launcher = Callable[..., Any]

ISOLATIONS = ("fork", "process")
ISOLATION = "fork" if sys.platform == "linux" else "process"  # elsewhere forks of torch are not safe

_OTHER_FILES = 50  # that the launcher has open beside its commands'


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would see, as CUDA_VISIBLE_DEVICES names them; without asking torch, which takes seconds."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, _ in enumerate(line for line in listing.stdout.splitlines() if line.startswith("GPU "))]


def child_environments(workers: int, threads: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """One environment a worker: this interpreter is its ``python``, its threads are limited, its GPU is chosen.

    Args:
        workers: number of commands at a time.
        threads: CPU threads of each; 0 leaves them alone.
        gpus: taken in turn; none leaves the choice alone.
    """
    common = dict(os.environ)
    common["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), common.get("PATH", os.defpath)])
    common |= thread_limits(threads)
    if not gpus:
        return [common] * workers
    return [common | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(workers)]


def local_launcher(
    commands: Sequence[str],
    *,
    workers: int | None = None,
    threads: int = 1,
    retries: int = 1,
    isolation: str = ISOLATION,
) -> list[int]:
    """Runs the commands on this machine, several at a time; ends them when it is ended.

    Args:
        commands: shell commands; ``python`` is this interpreter. Their stdout is dropped, for train keeps its own.
            Those that know their directory (``commands.Command``) are run without a shell, tried again, and left to
            other processes that already run them.
        workers: commands at a time; default: one a GPU, or without GPUs one a CPU core.
        threads: CPU threads of each; 0 leaves them alone.
        retries: how often a job that fails is tried again; bad input is not.
        isolation: ``"fork"``: trainings, if they are several, are forked from a process that has torch loaded;
            ``"process"``: each one's process is started afresh, with equal results.

    Returns:
        Exit codes in the order of the commands, negative for signals; 75 for what a cancelled sweep has left undone.

    Raises:
        ValueError: an option is out of range.
    """
    gpus = visible_gpus()
    workers = (len(gpus) or machine.cores()) if workers is None else workers
    if workers < 1 or threads < 0:
        raise ValueError(f"local launcher: workers must be >= 1 and threads >= 0; got {workers} and {threads}")
    if retries < 0 or isolation not in ISOLATIONS:
        allowed = f"retries must be >= 0 and isolation one of {', '.join(ISOLATIONS)}"
        raise ValueError(f"local launcher: {allowed}; got {retries} and {isolation}")
    if isolation == "fork" and sys.platform != "linux":
        raise ValueError("local launcher: isolation fork works on Linux only; take process")
    allowed_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= allowed_files < min(workers, len(commands)) + _OTHER_FILES:  # each command's stderr is a file
        raise ValueError(f"local launcher: {workers} workers are too many for `ulimit -n` {allowed_files}; take fewer")
    fork = isolation == "fork" and len(commands) > 1  # one alone would gain nothing
    return Pool(commands, child_environments(workers, threads, gpus), retries, fork).run()


def multi_gpu_launcher(
    commands: Sequence[str],
    *,
    threads: int = 1,
    jobs_per_gpu: int = 1,
    retries: int = 1,
    isolation: str = ISOLATION,
) -> list[int]:
    """Runs ``jobs_per_gpu`` commands at a time on each GPU; see ``local_launcher``.

    Raises:
        Unavailable: there is no GPU.
        ValueError: an option is out of range.
    """
    if jobs_per_gpu < 1:
        raise ValueError(f"multi_gpu launcher: jobs_per_gpu must be >= 1; got {jobs_per_gpu}")
    gpus = visible_gpus()
    if not gpus:
        raise Unavailable(
            "multi_gpu launcher: no GPU is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES, or use local"
        )
    workers = jobs_per_gpu * len(gpus)
    return local_launcher(commands, workers=workers, threads=threads, retries=retries, isolation=isolation)


def dummy_launcher(commands: Sequence[str]) -> None:
    """Prints the commands and runs none."""
    for command in commands:
        print(f"Dummy launcher: {command}")


REGISTRY: dict[str, Launcher] = {
    "local": local_launcher,
    "dummy": dummy_launcher,
    "multi_gpu": multi_gpu_launcher,
    "slurm": slurm_launcher,
}


def register(name: str, launcher: Launcher) -> None:
    """Adds a launcher: a function of the list of commands, DomainBed's kind, or with keyword-only options besides.

    Call it in a module that $DOMAINBED_PLUGINS names, or anywhere before the launcher is asked for.

    Raises:
        ValueError: another launcher has this name.
    """
    if REGISTRY.setdefault(name, launcher) is not launcher:
        raise ValueError(f"launcher registered twice: {name}; give one of them another name")


def find(name: str, options: Mapping[str, Any]) -> Launcher:
    """The launcher of that name with its options set; an option that is None counts as not given.

    Raises:
        NotImplementedError: no such launcher, plugins included.
        ValueError: the launcher lacks an option that is given.
    """
    if name not in REGISTRY:
        registry.load_plugins("command_launchers")
    if name not in REGISTRY:
        raise NotImplementedError(messages.not_found("launcher", name, REGISTRY))
    given = {key: value for key, value in options.items() if value is not None}
    if not given:
        return REGISTRY[name]
    parameters = inspect.signature(REGISTRY[name]).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if lacking := [key for key in given if key not in allowed]:
        known = ", ".join(f"--{key}" for key in allowed if key in options) or "none"
        raise ValueError(f"launcher {name} has no option --{lacking[0]}; it takes: {known}")
    return functools.partial(REGISTRY[name], **given)


if importlib.util.find_spec("domainbed.facebook"):  # DomainBed's hook for launchers that are kept out of the repository
    importlib.import_module("domainbed.facebook").register_command_launchers(REGISTRY)
