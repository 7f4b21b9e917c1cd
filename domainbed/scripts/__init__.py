"""The verbs: each script's ``main(argv)`` parses, calls what lies above, and prints."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from domainbed import states

BAD_INPUT_STATUS = states.EXIT_BAD_INPUT


class BadInput(Exception):
    """What the user asked for can't be done; the message says what to change."""


@contextmanager
def bad_input() -> Iterator[None]:
    """Marks a script's set-up, where an error of these types speaks of the user's input and not of a bug.

    Raises:
        BadInput: in place of a ValueError, NotImplementedError, OSError (but a BrokenPipeError) or ImportError.
    """
    try:
        yield
    except BrokenPipeError:  # nobody's input
        raise
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        raise BadInput(str(error) or type(error).__name__) from error


def run_cli(main: Callable[[list[str]], int | None]) -> None:
    """Ends the process with ``main(sys.argv[1:])`` as its status; bad input is one line on stderr and status 2.

    Where whoever reads stdout has gone, as head does when it has enough, the process ends at once, with status 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")  # what the library logs
    try:
        status = _status(main)
        print(end="", flush=True)  # what a closed pipe does not take shows here, not after our end
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = states.EXIT_FAILED
    sys.exit(status)


def _status(main: Callable[[list[str]], int | None]) -> Any:
    try:
        return main(sys.argv[1:])
    except SystemExit as end:  # argparse's, after --help too
        return end.code
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT_STATUS


def _reader_is_gone() -> bool:
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False
