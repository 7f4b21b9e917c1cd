"""Questions from scripts that do without torch to a process that has it: JSON there, JSON back."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any


class Failed(RuntimeError):
    """The process ended without an answer; what it wrote to stderr says why."""


def ask(module: str, question: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What ``python -m module`` answers; its stderr is ours.

    Args:
        question: JSON, which it reads from stdin.
        environment: variables that are set there.

    Raises:
        Failed: it ended otherwise than by an answer.
    """
    run = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if run.returncode:
        raise Failed(f"python -m {module} ended with exit status {run.returncode}; see what it wrote above")
    return json.loads(run.stdout)


def answer(function: Callable[[Any], Any], argv: Sequence[str] = (), description: str | None = None) -> int:
    """The other side: answers the question on stdin; whatever else is printed goes to stderr.

    Args:
        argv: the script's, which takes no argument but ``--help``.
        description: of the script, for ``--help``.
    """
    argparse.ArgumentParser(description=description).parse_args(argv)
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        found = function(json.load(sys.stdin))
    json.dump(found, out)
    return 0
