"""Wording that many errors share: a name that is not known, and a list of problems that may be long."""

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 20  # problems that a message lists; of the others it gives the number


def not_found(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name: what came, the nearest known name, what is allowed."""
    known = list(known)
    folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"; did you mean {folded[close[0]]}?" if close else ";"
    return f"{kind} not found: {name}{hint} known: {', '.join(known)}"


def listed(head: str, problems: Sequence[str]) -> str:
    """A message of several lines: the head, the first problems, and how many more there are."""
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([head, *problems[:SHOWN], *more])
