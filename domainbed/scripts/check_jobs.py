"""What no run could be made of, in lists of train's arguments: ``sweep_checks`` asks, see ``torch_process``."""

import logging
from collections.abc import Sequence
from typing import Any

from domainbed import backbones, datasets, messages, partitions
from domainbed.algorithms import get_algorithm_class
from domainbed.rows import pseudo_confounders
from domainbed.scripts import run_cli, torch_process
from domainbed.scripts.train_arguments import completed, resolve
from domainbed.training import EarlyStopping


def problem(args: dict[str, Any]) -> str | None:
    """What is wrong with a job's arguments, as far as it shows without data; None if nothing."""
    try:
        args = completed(args)
        hparams = resolve(args)
        _check_options(args)
        _check_hparams(hparams)
    except (ValueError, NotImplementedError, ImportError) as error:
        return str(error) or type(error).__name__
    return None


def _check_options(args: dict[str, Any]) -> None:
    options = datasets.get_dataset_class(args["dataset"]).OPTIONS
    if args["confounders"] is not None and not pseudo_confounders(args) and "confounders" not in options:
        raise ValueError(f"{args['dataset']} leaves no choice of --confounders; leave it out")
    if args["task"] == "domain_adaptation" and not args["uda_holdout_fraction"]:
        raise ValueError("--task domain_adaptation needs unlabelled images; give --uda_holdout_fraction 0.5, say")
    least = getattr(get_algorithm_class(args["algorithm"]), "MIN_PARTS", 1)
    if args["partition"] in partitions.SINGLE_PART and least > 1:
        made = f"partition {args['partition']} makes one"
        raise ValueError(f"{args['algorithm']} compares at least {least} minibatches, {made}")


def _check_hparams(hparams: dict[str, Any]) -> None:
    if "patience" in hparams:
        EarlyStopping(hparams["patience"], hparams.get("min_delta", 1e-4))
    library, _, model = str(hparams.get("backbone", "")).partition(":")
    if library and library not in (backbones.LIBRARIES if model else backbones.BACKBONES):
        known = [*backbones.BACKBONES, *(f"{name}:NAME" for name in backbones.LIBRARIES)]
        raise NotImplementedError(messages.not_found("backbone", hparams["backbone"], known))


class _Once(logging.Filter):
    """Lets every message through once: many jobs give rise to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


def main(argv: Sequence[str]) -> int:
    """Reads a list of arguments from stdin; writes a list of problems, null where there is none."""
    return torch_process.answer(_problems, argv, __doc__)


def _problems(several: Sequence[dict[str, Any]]) -> list[str | None]:
    for handler in logging.getLogger().handlers:
        handler.addFilter(_Once())
    return [problem(args) for args in several]


if __name__ == "__main__":
    run_cli(main)
