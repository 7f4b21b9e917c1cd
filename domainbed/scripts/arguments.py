"""A parser to which flags can be added without breaking the abbreviations that DomainBed's users type."""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

_PERCENT = re.compile(r"(%%|%\()|%")


class _HelpFormatter(argparse.HelpFormatter):
    """Shows defaults, and lets a help text hold a plain percent sign."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = _PERCENT.sub(lambda found: found[1] or "%%", action.help or "")
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))  # 0 is worth showing
        return text if silent else f"{text} (default: %(default)s)"


class DomainBedParser(argparse.ArgumentParser):
    """An ArgumentParser in which the abbreviations of DomainBed's own flags stay what they were.

    ``--test_env 2`` is in DomainBed's documentation, so ``--test_envs`` must win over any flag added here that
    begins alike. Among DomainBed's flags, what was ambiguous stays an error.

    Args:
        domainbed_flags: names of the flags that DomainBed's script has, without dashes.
        options: as for ArgumentParser.
    """

    def __init__(self, domainbed_flags: Collection[str], **options: Any):
        super().__init__(formatter_class=_HelpFormatter, **options)
        self._first = [f"--{flag}" for flag in (*domainbed_flags, "help")]

    def flags(self) -> list[str]:
        """The names of all flags but help, without dashes."""
        return [option[2:] for option in self._option_string_actions if option.startswith("--") and option != "--help"]

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As ArgumentParser's, with the abbreviations of DomainBed's flags written out first."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([self._written_out(word) for word in words[:end]] + words[end:], namespace)

    def _written_out(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in self._option_string_actions:
            return word
        meant = [known for known in self._first if known.startswith(flag)]
        return meant[0] + equals + value if len(meant) == 1 else word


def seconds(text: str) -> float:
    """A flag's number of seconds."""
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0, or no number")
    return value


def add_trusted(parser: argparse.ArgumentParser) -> None:
    """The flag of scripts that load models."""
    parser.add_argument(
        "--trusted", action="store_true", help="load a model's file whatever it holds, which may run code"
    )
