"""Ways to run a list of shell commands: on this machine, on its GPUs, or not at all.

A launcher takes the list of commands. It may take options as keyword-only parameters, and may return the commands'
exit codes in their order. A further launcher is one more entry of ``REGISTRY``.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

from tqdm import tqdm

from domainbed import machine, messages, registry

Launcher = Callable[..., Any]


class Unavailable(RuntimeError):
    """This machine lacks what a launcher runs commands on."""


_POLL_S = 0.05
_GRACE_S = 30.0  # a training process that is told to end saves its state first
_SHOWN_FAILURES = 5


@dataclass
class _Child:
    """A command that runs: its place in the list, its process, its stderr, and the environment it occupies."""

    index: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    environment: dict[str, str]

    @classmethod
    def start(cls, index: int, command: str, environment: dict[str, str]) -> "_Child":
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child; a pipe would have to be drained
        process = subprocess.Popen(
            command,
            shell=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end the whole group
        )
        return cls(index, process, errors, environment)

    def signal_group(self, number: int) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def last_lines(self, count: int = 3) -> str:
        self.errors.seek(0)
        return "\n".join(self.errors.read().decode(errors="replace").splitlines()[-count:])


def _end(children: Sequence[_Child]) -> None:
    """Asks all to end, then kills what is left after a while, or at once on a second Ctrl-C."""
    if not children:
        return
    print(f"Ending {len(children)} running commands; again to kill them.", file=sys.stderr)
    deadline = time.monotonic() + _GRACE_S
    try:
        for child in children:
            child.signal_group(signal.SIGTERM)
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in children:
            child.signal_group(signal.SIGKILL)
            child.process.wait()
            child.errors.close()


def _exit_on_sigterm(number: int, frame: object) -> None:
    sys.exit(128 + number)


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Lets SIGTERM unwind the stack as Ctrl-C does, so that the children are ended."""
    previous = signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Pool:
    """Runs commands, at most one at a time in each environment."""

    def __init__(self, commands: Sequence[str], environments: Sequence[dict[str, str]]):
        self.commands = commands
        self.waiting = deque(enumerate(commands))
        self.free = deque(environments)
        self.running: list[_Child] = []
        self.codes = [0] * len(commands)
        self.failed = 0

    def run(self) -> list[int]:
        with _sigterm_exits(), tqdm(total=len(self.commands), desc="jobs", file=sys.stderr) as bar:
            try:
                while self.waiting or self.running:
                    self.start()
                    if not self.collect(bar):
                        time.sleep(_POLL_S)
            finally:
                _end(self.running)
        return self.codes

    def start(self) -> None:
        while self.waiting and self.free:
            index, command = self.waiting.popleft()
            self.running.append(_Child.start(index, command, self.free.popleft()))

    def collect(self, bar: Any) -> bool:
        """Takes in what has ended; whether anything had."""
        ended = [child for child in self.running if child.process.poll() is not None]
        for child in ended:
            self.running.remove(child)
            self.free.append(child.environment)
            self.codes[child.index] = child.process.returncode
            if child.process.returncode:
                self.show_failure(child)
            child.errors.close()
            bar.set_postfix(failed=self.failed, refresh=False)
            bar.update()
        return bool(ended)

    def show_failure(self, child: _Child) -> None:
        self.failed += 1
        if self.failed <= _SHOWN_FAILURES:
            text = f"exit status {child.process.returncode}: {self.commands[child.index]}\n{child.last_lines()}"
            tqdm.write(text.rstrip(), file=sys.stderr)


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
    if threads:
        common |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if not gpus:
        return [common] * workers
    return [common | {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(workers)]


def local_launcher(commands: Sequence[str], *, workers: int | None = None, threads: int = 1) -> list[int]:
    """Runs the commands on this machine, several at a time; ends them when it is ended.

    Args:
        commands: shell commands; ``python`` is this interpreter. Their stdout is dropped, for train keeps its own.
        workers: commands at a time; default: one a GPU, or without GPUs one a CPU core.
        threads: CPU threads of each; 0 leaves them alone.

    Returns:
        Exit codes in the order of the commands, negative for signals.

    Raises:
        ValueError: ``workers`` or ``threads`` is out of range.
    """
    gpus = visible_gpus()
    workers = (len(gpus) or machine.cores()) if workers is None else workers
    if workers < 1 or threads < 0:
        raise ValueError(f"local launcher: workers must be >= 1 and threads >= 0; got {workers} and {threads}")
    return _Pool(commands, child_environments(workers, threads, gpus)).run()


def multi_gpu_launcher(commands: Sequence[str], *, threads: int = 1) -> list[int]:
    """Runs one command at a time on each GPU; see ``local_launcher``.

    Raises:
        Unavailable: there is no GPU.
    """
    gpus = visible_gpus()
    if not gpus:
        raise Unavailable(
            "multi_gpu launcher: no GPU is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES, or use local"
        )
    return local_launcher(commands, workers=len(gpus), threads=threads)


def dummy_launcher(commands: Sequence[str]) -> None:
    """Prints the commands and runs none."""
    for command in commands:
        print(f"Dummy launcher: {command}")


REGISTRY: dict[str, Launcher] = {"local": local_launcher, "dummy": dummy_launcher, "multi_gpu": multi_gpu_launcher}


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
        known = ", ".join(f"--{key}" for key in allowed) or "none"
        raise ValueError(f"launcher {name} has no option --{lacking[0]}; it takes: {known}")
    return functools.partial(REGISTRY[name], **given)


if importlib.util.find_spec("domainbed.facebook"):  # DomainBed's hook for launchers that are kept out of the repository
    importlib.import_module("domainbed.facebook").register_command_launchers(REGISTRY)
