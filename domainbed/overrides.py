"""Hparams as a user gives them: a JSON object."""

import json
from typing import Any


def parse(text: str | None) -> dict[str, Any]:
    """The hparams in a JSON object such as ``{"lr": 0.001}``; none for None or an empty text.

    Raises:
        ValueError: the text is something else.
    """
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"""hparams are a JSON object like '{{"lr": 0.001, "resnet18": true}}'; got: {text}""")
    return found
