"""What a training is made of, from its arguments and hparams: dataset, splits, minibatches, plan and algorithm."""

import functools
import inspect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from domainbed import (
    datasets,
    inferred_confounders,
    interruption,
    mask_files,
    notices,
    partitions,
    predictors,
    training,
)
from domainbed.algorithms import get_algorithm_class
from domainbed.algorithms.base import Task
from domainbed.algorithms.base import build as build_algorithm
from domainbed.explainers import Explainer
from domainbed.feature_maps import evaluating
from domainbed.loaders import TrainingLoader, group_counts
from domainbed.rows import pseudo_confounders
from domainbed.samples import Sample, StageData
from domainbed.scripts.train_execution import Run, RunStage
from domainbed.seeding import seed_hash
from domainbed.splits import Split, annotate, selection_splits, split_environments, training_splits, validation_splits
from domainbed.stages import Stage, ends

DATASET_OPTIONS = ("confounders",)  # flags that a dataset's constructor takes if its class says so


def build(args: dict[str, Any], hparams: dict[str, Any], loader: type[TrainingLoader] = TrainingLoader) -> Run:
    """Builds dataset, splits, loaders and algorithm, in the order in which DomainBed's random numbers are drawn.

    Args:
        loader: how minibatches are drawn.

    Raises:
        ValueError, FileNotFoundError: what was asked for doesn't fit together, or files are missing.
    """
    training.keep_freed_memory()
    dataset, splits = build_data(args, hparams)
    test_envs = args["test_envs"]
    validation = granted(dataset, validation_splits(dataset, splits, test_envs), args)
    stopping = early_stopping(hparams)
    if not (dataset.num_confounders > 1 and validation):
        refuse_what_needs_validation(args, hparams)

    trained = training_splits(dataset, splits, test_envs)
    notices.report_unseen(dataset, trained, [split for split in splits if split.env in test_envs])
    method = pseudo_confounders(args)
    known, num_confounders = (
        inferred(method, dataset, trained, args, hparams) if method else annotated(dataset, trained, args)
    )
    draw = functools.partial(
        build_loader,
        dataset=dataset,
        num_confounders=num_confounders,
        args=args,
        hparams=hparams,
        num_environments=len(trained),
        with_masks=needs_masks(dataset, args),
        loader=loader,
    )
    minibatches = draw(known, args["partition"])
    reads_confounders = getattr(get_algorithm_class(args["algorithm"]), "NEEDS_CONFOUNDERS", False)
    if not method and (reads_confounders or args["partition"] in partitions.BY_CONFOUNDER):
        notices.report_not_annotated(dataset, trained, known)
    adapts = args["task"] == "domain_adaptation"
    unlabeled = build_unlabeled(splits, dataset, args, hparams, loader) if adapts else None
    measured = splits if args["eval_splits"] == "all" else selection_splits(dataset, splits, test_envs)
    budgeted = {(split.env, split.kind): split for split in validation}
    measured = [budgeted.get((split.env, split.kind), split) for split in measured]
    smallest = min(len(split) for split in splits if split.kind == "in")
    shares = group_counts(trained, dataset.num_classes, dataset.num_confounders)
    pass_steps = math.ceil(sum(map(len, trained)) / (minibatches.rows * len(minibatches.parts)))
    plan = build_plan(dataset, measured, smallest / hparams["batch_size"], pass_steps, args, shares)
    task = build_task(dataset, minibatches, plan.steps)
    algorithm = build_algorithm(get_algorithm_class(args["algorithm"]), task, hparams).to(device())
    if args["explain"]:
        Explainer(algorithm).check(task.input_shape)  # now, not when the training is over
    data = StageData(
        build_sample(dataset, known, num_confounders), build_sample(dataset, validation, dataset.num_confounders)
    )
    stages = build_stages(algorithm, minibatches, plan, hparams, data, draw, args["partition"])
    return Run(
        args, hparams, task, algorithm, stages, data, unlabeled, validation, plan, stopping, device(), about(dataset)
    )


def build_task(dataset: Any, minibatches: TrainingLoader, steps: int) -> Task:
    return Task(
        input_shape=tuple(dataset.input_shape),
        num_classes=dataset.num_classes,
        num_domains=len(minibatches.parts),
        num_confounders=minibatches.examples.num_confounders,
        group_counts=minibatches.group_counts(dataset.num_classes),
        steps=steps,
        part_counts=tuple(len(part.positions) for part in minibatches.parts),
        hidden_counts=minibatches.hidden_counts(dataset.num_classes),
    )


def build_sample(dataset: Any, splits: Sequence[Split], num_confounders: int) -> Sample:
    return Sample(splits, num_confounders, device(), dataset.N_WORKERS)


def build_stages(
    algorithm: Any,
    minibatches: TrainingLoader,
    plan: training.Plan,
    hparams: dict[str, Any],
    data: StageData,
    draw: Callable[..., TrainingLoader],
    partition: str,
) -> list[RunStage]:
    """The stages that the algorithm declares, else a single one; only the last one is measured.

    Args:
        minibatches: the run's own loader.
        draw: builds another one, of splits, by a partition and odds.
    """

    def loader(stage: Stage, odds: NDArray[np.float64] | None) -> TrainingLoader:
        own, sample = stage.partition or partition, data.training
        if not stage.of_features:
            return minibatches if odds is None and own == partition else draw(sample.splits, own, odds=odds)
        with torch.no_grad(), evaluating(algorithm):
            features = sample.map(algorithm.stage_features)
        return draw(sample.replaced(features), own, odds=odds)

    stages = getattr(algorithm, "STAGES", ()) or (Stage("training"),)
    plans = [replace(plan, steps=end, splits=()) for end in ends(stages, plan.steps, hparams)]
    plans[-1] = plan
    return [
        RunStage(stage.name, own, functools.partial(loader, stage)) for stage, own in zip(stages, plans, strict=True)
    ]


def build_data(args: dict[str, Any], hparams: dict[str, Any]) -> tuple[Any, list[Split]]:
    """The dataset and its splits; the first of all that draws from the run's seed."""
    seed_everything(args["seed"])
    dataset = build_dataset(args, hparams)
    dataset.use_input_pipeline(args["input_pipeline"])
    fractions = args["holdout_fraction"], args["uda_holdout_fraction"]
    return dataset, split_environments(dataset, args["test_envs"], *fractions, trial_seed=args["trial_seed"])


def about(dataset: Any) -> dict[str, Any]:
    """What a model says of the dataset, so that it predicts where that is not known."""
    normalised = predictors.normalises(dataset.input_shape, dataset.HPARAMS_SIZE, dataset.NORMALISED)
    return {"class_names": list(map(str, dataset.CLASSES)), "normalised": normalised}


def refuse_what_needs_validation(args: dict[str, Any], hparams: dict[str, Any]) -> None:
    """Raises ValueError if something asks for a validation score, which takes groups."""
    for name, asked in {"--keep_best": args["keep_best"], "hparam patience": hparams.get("patience")}.items():
        if asked:
            raise ValueError(f"{name} needs groups and validation images; {args['dataset']} as split here lacks them")


def early_stopping(hparams: dict[str, Any]) -> training.EarlyStopping | None:
    """What the hparams ``patience`` (checkpoints) and ``min_delta`` ask for; None without a patience."""
    if "patience" not in hparams:
        return None
    return training.EarlyStopping(hparams["patience"], hparams.get("min_delta", 1e-4))


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
    method: str, dataset: Any, trained: Sequence[Split], args: dict[str, Any], hparams: dict[str, Any]
) -> tuple[list[Split], int]:
    """The training splits with pseudo-confounders, of which all are known whatever the budget, and how many values.

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
        device(),
        dataset.num_confounders,
        dataset.N_WORKERS,
        args["precision"],
    )
    try:
        found = inferred_confounders.infer(method, trained, setting, Path(args["output_dir"]))
    except interruption.Preempted as request:
        raise interruption.Unsaved(str(request)) from request
    notices.report_inferred(found.num_confounders, found.agreement)
    return found.splits, found.num_confounders


def annotated(dataset: Any, trained: Sequence[Split], args: dict[str, Any]) -> tuple[list[Split], int]:
    """The training splits within the annotation budget, and the number of confounder values.

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
        return splits, dataset.num_confounders
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
    return known, dataset.num_confounders


def needs_masks(dataset: Any, args: dict[str, Any]) -> bool:
    """Whether the algorithm learns from masks.

    Raises:
        ValueError: it does, and the dataset has none.
    """
    needed = getattr(get_algorithm_class(args["algorithm"]), "NEEDS_MASKS", False)
    if needed and not dataset.has_masks:
        raise ValueError(
            f"{args['algorithm']} learns from masks, and {args['dataset']} has none; give --mask_dir, a folder of "
            "them (docs/datasets.md says how they are named), or take a dataset that has masks"
        )
    return needed


def build_plan(
    dataset: Any,
    measured: Sequence[Split],
    steps_per_epoch: float,
    pass_steps: int,
    args: dict[str, Any],
    training_counts: tuple[int, ...],
) -> training.Plan:
    """The plan; ``pass_steps`` is how many steps draw as many images as are trained on, an epoch of ``--epochs``."""
    epochs = args["epochs"]
    return training.Plan(
        steps=epochs * pass_steps if epochs else args["steps"] or dataset.N_STEPS,
        checkpoint_freq=args["checkpoint_freq"] or (pass_steps if epochs else dataset.CHECKPOINT_FREQ),
        steps_per_epoch=steps_per_epoch,
        splits=measured,
        num_classes=dataset.num_classes,
        num_confounders=dataset.num_confounders,
        precision=args["precision"],
        num_workers=dataset.N_WORKERS,
        training_counts=training_counts,
    )


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_dataset(args: dict[str, Any], hparams: dict[str, Any]) -> Any:
    dataset_class: Any = datasets.get_dataset_class(args["dataset"])
    if args["data_dir"] is None and dataset_class.NEEDS_DATA_DIR:
        raise ValueError(f"{args['dataset']} needs --data_dir, the directory of its files")
    given = {name: args[name] for name in DATASET_OPTIONS if args[name] is not None and not pseudo_confounders(args)}
    if refused := given.keys() - set(dataset_class.OPTIONS):
        raise ValueError(f"{args['dataset']} leaves no choice of --{', --'.join(sorted(refused))}; leave it out")
    try:
        dataset = dataset_class(args["data_dir"], args["test_envs"], hparams, **given)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}\n{layout(dataset_class)}") from error
    dataset.check_arrays()
    notices.report_release(dataset)
    if args.get("mask_dir"):
        mask_files.use(dataset, Path(args["mask_dir"]))
    return dataset


def layout(dataset_class: type) -> str:
    """What the class's docstring says of the files, and where they come from."""
    text = inspect.getdoc(dataset_class) or ""
    words = text.partition("Layout:")[2].partition("\n\n")[0].split()
    fetch = "`python -m domainbed.scripts.download --list` says which files can be downloaded"
    return f"Layout below --data_dir: {' '.join(words)}\n{fetch}" if words else fetch


def build_loader(
    splits: Sequence[Split],
    partition: str,
    dataset: Any,
    args: dict[str, Any],
    hparams: dict[str, Any],
    num_environments: int,
    with_masks: bool = False,
    loader: type[TrainingLoader] = TrainingLoader,
    odds: NDArray[np.float64] | None = None,
    num_confounders: int | None = None,
) -> TrainingLoader:
    return loader(
        splits,
        partitions.REGISTRY[partition],
        hparams["batch_size"],
        num_confounders or dataset.num_confounders,
        args["seed"],
        hparams["class_balanced"],
        dataset.N_WORKERS,
        device(),
        num_environments,
        with_masks,
        odds,
    )


def build_unlabeled(
    splits: Sequence[Split],
    dataset: Any,
    args: dict[str, Any],
    hparams: dict[str, Any],
    loader: type[TrainingLoader] = TrainingLoader,
) -> TrainingLoader:
    """The loader of the test environments' uda-splits; their classes, which nobody knows, are never balanced.

    Raises:
        ValueError: there are no such splits.
    """
    uda = [split for split in splits if split.kind == "uda"]
    if not uda:
        given = args["uda_holdout_fraction"]
        raise ValueError(
            "--task domain_adaptation needs unlabelled images; give --uda_holdout_fraction 0.5, say"
            + (f" ({given} of each test environment is less than one image)" if given else "")
        )
    own = {"seed": seed_hash("unlabeled", args["seed"])}  # draws that are not those of the training images
    unbalanced = hparams | {"class_balanced": False}
    return build_loader(uda, "environment", dataset, args | own, unbalanced, len(uda), loader=loader)


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's generators; deterministic convolutions."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
