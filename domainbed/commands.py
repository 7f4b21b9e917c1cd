"""The shell command of a job, which also knows its words and its directory."""

import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

TRAIN = ("python", "-m", "domainbed.scripts.train")

_quoted = functools.lru_cache(4096)(shlex.quote)  # the jobs of a sweep share most of their words


def _words(key: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{key}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [f"--{key}", *map(str, values)]


class Command(str):
    """A shell command, as DomainBed's launchers take it; ours run its words without a shell.

    Attributes:
        argv: the words, ``python`` first.
        output_dir: the directory of the job that it runs.
    """

    argv: tuple[str, ...]
    output_dir: str

    def __new__(cls, argv: Sequence[str], output_dir: str) -> "Command":
        self = super().__new__(cls, " ".join(map(_quoted, argv)))
        self.argv, self.output_dir = tuple(argv), output_dir
        return self

    def __getnewargs__(self) -> tuple[Sequence[str], str]:  # type: ignore[override]  # what pickling rebuilds it from
        return self.argv, self.output_dir


def program(argv: Sequence[str]) -> list[str]:
    """The words to run; ``python`` is this interpreter."""
    return [sys.executable if argv[0] == "python" else argv[0], *argv[1:]]


def thread_limits(threads: int) -> dict[str, str]:
    """The environment of a process with so many CPU threads; 0 leaves them alone."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} if threads else {}


def train_command(train_args: Mapping[str, Any], more: Sequence[str] = ()) -> Command:
    """The command that trains with these arguments, in key order.

    Args:
        more: words that follow, which say how and not what: they are no part of the run's identity.
    """
    words = [word for key, value in sorted(train_args.items()) for word in _words(key, value)]
    return Command([*TRAIN, *words, *more], train_args["output_dir"])
