"""What a training is made of, from its arguments and hparams: dataset, splits, minibatches, plan and algorithm."""

import functools
import inspect
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from domainbed import (
    datasets,
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
from domainbed.loaders import TrainingLoader, group_counts
from domainbed.rows import pseudo_confounders
from domainbed.samples import Sample, StageData
from domainbed.scripts.train_annotations import granted, training_images
from domainbed.scripts.train_execution import Run
from domainbed.scripts.train_stages import build_stages
from domainbed.seeding import seed_hash
from domainbed.splits import Split, selection_splits, split_environments, training_splits, validation_splits

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
    known, num_confounders, facts = training_images(dataset, trained, args, hparams, device())
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
    adapts = args["task"] == "domain_adaptation"
    unlabeled = build_unlabeled(splits, dataset, args, hparams, loader) if adapts else None
    plan = build_plan(dataset, splits, validation, minibatches, args, hparams)
    task = build_task(dataset, minibatches, plan.steps)
    algorithm = build_algorithm(get_algorithm_class(args["algorithm"]), task, hparams).to(device())
    if args["explain"]:
        Explainer(algorithm).check(task.input_shape)  # now, not when the training is over
    data = StageData(
        build_sample(dataset, known, num_confounders), build_sample(dataset, validation, dataset.num_confounders)
    )
    if getattr(algorithm, "STAGES", ()):
        algorithm.check_stages(data)
    stages = build_stages(algorithm, minibatches, plan, hparams, data, draw, args["partition"])
    return Run(
        args, hparams, task, algorithm, stages, data, unlabeled, validation, plan, stopping, device(), about(dataset),
        facts,
    )  # fmt: skip


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
    splits: Sequence[Split],
    validation: Sequence[Split],
    minibatches: TrainingLoader,
    args: dict[str, Any],
    hparams: dict[str, Any],
) -> training.Plan:
    """The plan; an epoch of ``--epochs`` is as many steps as draw as many images as are trained on.

    Args:
        validation: those of the splits that validate, as the budget grants their confounders.
    """
    epochs, test_envs = args["epochs"], args["test_envs"]
    trained, smallest = training_splits(dataset, splits, test_envs), min(len(s) for s in splits if s.kind == "in")
    pass_steps = math.ceil(sum(map(len, trained)) / (minibatches.rows * len(minibatches.parts)))
    measured = splits if args["eval_splits"] == "all" else selection_splits(dataset, splits, test_envs)
    budgeted = {(split.env, split.kind): split for split in validation}
    return training.Plan(
        steps=epochs * pass_steps if epochs else args["steps"] or dataset.N_STEPS,
        checkpoint_freq=args["checkpoint_freq"] or (pass_steps if epochs else dataset.CHECKPOINT_FREQ),
        steps_per_epoch=smallest / hparams["batch_size"],
        splits=[budgeted.get((split.env, split.kind), split) for split in measured],
        num_classes=dataset.num_classes,
        num_confounders=dataset.num_confounders,
        precision=args["precision"],
        num_workers=dataset.N_WORKERS,
        training_counts=group_counts(trained, dataset.num_classes, dataset.num_confounders),
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
