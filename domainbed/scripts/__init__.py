"""The verbs: each script's ``main(argv)`` parses, calls what lies above, and prints."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from domainbed import states

BAD_INPUT_STATUS = states.EXIT_BAD_INPUT


class BadInput(Exception):
    """What the user asked for can't be done; the message says what to change."""


@contextmanager
def bad_input() -> Iterator[None]:
    """Marks a script's set-up, where an error of these types speaks of the user's input and not of a bug.

    Raises:
        BadInput: in place of a ValueError, NotImplementedError, OSError or ImportError.
    """
    try:
        yield
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        raise BadInput(str(error) or type(error).__name__) from error


def run_cli(main: Callable[[list[str]], int | None]) -> None:
    """Ends the process with ``main(sys.argv[1:])`` as its status; bad input is one line on stderr and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")  # what the library logs
    try:
        sys.exit(main(sys.argv[1:]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT_STATUS)
