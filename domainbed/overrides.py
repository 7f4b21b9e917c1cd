"""Hparams as a user gives them: JSON objects of values, and of distributions to draw values from."""

import json
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from numpy.random import RandomState


Draw: TypeAlias = "Callable[[RandomState], Any]"

_UNIFORM = re.compile(
    r"(?P<int>int\s+)?(?:(?P<base>10|2)\s*\^\s*)?U\s*\(\s*(?P<low>[^,]+?)\s*,\s*(?P<high>[^,]+?)\s*\)"
)
_FORMS = 'take "U(a, b)", "10^U(a, b)" or "2^U(a, b)" ("int " in front truncates), or a list of values'


def parse(text: str | None) -> dict[str, Any]:
    """The hparams in a JSON object such as ``{"lr": 0.001}``; none for None or an empty text.

    Raises:
        ValueError: the text is something else.
    """
    return _object(text, """hparams are a JSON object like '{"lr": 0.001, "resnet18": true}'""")


def parse_ranges(text: str | None) -> dict[str, Draw]:
    """How to draw each hparam of a JSON object such as ``{"lr": "10^U(-4, -2)"}``; none for None or an empty text.

    ``U(a, b)`` is uniform, ``10^U(a, b)`` and ``2^U(a, b)`` are powers of a uniform exponent; "int " in front
    truncates. Of a list, each value has an equal chance.

    Raises:
        ValueError: the text is no JSON object, or a value is none of these.
    """
    ranges = _object(text, """ranges are a JSON object like '{"lr": "10^U(-4, -2)", "batch_size": [32, 64]}'""")
    return {name: _draw(name, form) for name, form in ranges.items()}


def _object(text: str | None, wanted: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{wanted}; got: {text}")
    return found


def _draw(name: str, form: Any) -> Draw:
    if isinstance(form, list) and form and all(isinstance(value, bool | int | float | str) for value in form):
        return lambda r: form[r.choice(len(form))]
    uniform = _UNIFORM.fullmatch(form.strip()) if isinstance(form, str) else None
    if uniform is None:
        raise ValueError(f"range of {name} is {json.dumps(form)}; {_FORMS}")
    low, high = _bounds(name, form, uniform["low"], uniform["high"])
    base = int(uniform["base"] or 0)
    if base and max(abs(low), abs(high)) > 300:
        raise ValueError(f"range of {name} is {form!r}, beyond what a number holds; give exponents from -300 to 300")
    kind: type = int if uniform["int"] else float
    return lambda r: kind(base ** r.uniform(low, high) if base else r.uniform(low, high))


def _bounds(name: str, form: str, *texts: str) -> tuple[float, float]:
    try:
        low, high = map(float, texts)
    except ValueError:
        raise ValueError(f"range of {name} is {form!r}, whose bounds are no numbers; {_FORMS}") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"range of {name} is {form!r}; give finite bounds")
    if low > high:
        raise ValueError(
            f"range of {name} is {form!r}, with the lower bound above the upper; write U({high:g}, {low:g})"
        )
    return low, high
