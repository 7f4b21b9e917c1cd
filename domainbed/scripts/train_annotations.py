"""Which confounders training and selection may know: those that the budgets grant, or inferred ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainbed import inferred_confounders, interruption, notices, partitions, records
from domainbed.algorithms import get_algorithm_class
from domainbed.rows import pseudo_confounders
from domainbed.splits import Split, annotate


def training_images(
    dataset: Any, trained: Sequence[Split], args: dict[str, Any], hparams: dict[str, Any], device: torch.device
) -> tuple[list[Split], int, dict[str, float]]:
    """What is trained on, with the confounders that training may know; how many values these have; what records say."""
    if method := pseudo_confounders(args):
        return inferred(method, dataset, trained, args, hparams, device)
    known = annotated(dataset, trained, args)
    reads_confounders = getattr(get_algorithm_class(args["algorithm"]), "NEEDS_CONFOUNDERS", False)
    if reads_confounders or args["partition"] in partitions.BY_CONFOUNDER:
        notices.report_not_annotated(dataset, trained, known)
    return known, dataset.num_confounders, {}


def annotated(dataset: Any, trained: Sequence[Split], args: dict[str, Any]) -> list[Split]:
    """The training splits within the annotation budget.

    An algorithm that reads confounders gets no image without one, unless it says that it takes such images.

    Raises:
        ValueError: the budget is no share, there is nothing to annotate, or it leaves such an algorithm less than two
            confounder values.
    """
    budget, algorithm_class = args["annotation_budget"], get_algorithm_class(args["algorithm"])
    if budget != 1 and dataset.num_confounders < 2:
        raise ValueError(f"--annotation_budget {budget}: {args['dataset']} knows no confounder; leave it out")
    splits = annotate(trained, budget, args["trial_seed"])
    notices.report_budget(splits)
    if not getattr(algorithm_class, "NEEDS_CONFOUNDERS", False):
        return splits
    if dataset.num_confounders < 2:
        cause = f"{args['algorithm']} learns from confounders, and {args['dataset']} knows none"
        raise ValueError(f"{cause}; {partitions.ADVICE}")
    known = splits
    if not getattr(algorithm_class, "TAKES_HIDDEN", False):
        known = [split for split in map(Split.only_annotated, splits) if len(split)]
    values = {c for split in known for c in np.unique(split.c)}  # -1 is one, too
    if len(values) < 2 and values != {-1}:
        raise ValueError(
            f"{args['algorithm']} learns from confounder labels and needs two values of them; the training images have "
            f"fewer within --annotation_budget {budget}; raise it, or take other --test_envs"
        )
    return known


def granted(dataset: Any, validation: Sequence[Split], args: dict[str, Any]) -> list[Split]:
    """The validation splits within the validation budget.

    Raises:
        ValueError: the budget is no share, or there is nothing to annotate.
    """
    budget = args["validation_budget"]
    if budget != 1 and dataset.num_confounders < 2:
        raise ValueError(f"--validation_budget {budget}: {args['dataset']} knows no confounder; leave it out")
    return annotate(validation, budget, args["trial_seed"], of="validation")


def inferred(
    method: str,
    dataset: Any,
    trained: Sequence[Split],
    args: dict[str, Any],
    hparams: dict[str, Any],
    device: torch.device,
) -> tuple[list[Split], int, dict[str, float]]:
    """As ``training_images``, with pseudo-confounders, of which all are known whatever the budget.

    Raises:
        NotImplementedError: no such method.
        Unsaved: somebody asked to end meanwhile.
    """
    setting = inferred_confounders.Setting(
        dataset.num_classes,
        tuple(dataset.input_shape),
        hparams,
        args["steps"] or dataset.N_STEPS,
        args["seed"],
        device,
        dataset.num_confounders,
        dataset.N_WORKERS,
        args["precision"],
    )
    try:
        found = inferred_confounders.infer(method, trained, setting, Path(args["output_dir"]))
    except interruption.Preempted as request:
        raise interruption.Unsaved(str(request)) from request
    notices.report_inferred(found.num_confounders, found.agreement)
    return found.splits, found.num_confounders, records.inferred(found.num_confounders, found.agreement)
