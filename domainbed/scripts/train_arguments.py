"""The train script's flags, what they may be, and the hparams that they ask for."""

import argparse
from collections.abc import Sequence
from typing import Any

from domainbed import (
    datasets,
    hparams_registry,
    inferred_confounders,
    input_pipelines,
    overrides,
    partitions,
    snapshots,
)
from domainbed.algorithms import get_algorithm_class
from domainbed.rows import pseudo_confounders
from domainbed.scripts.arguments import DomainBedParser, seconds
from domainbed.seeding import seed_hash

DOMAINBED_FLAGS = (
    "data_dir", "dataset", "algorithm", "task", "hparams", "hparams_seed", "trial_seed", "seed", "steps",
    "checkpoint_freq", "test_envs", "output_dir", "holdout_fraction", "uda_holdout_fraction", "skip_model_save",
    "save_model_every_checkpoint",
)  # fmt: skip
TASKS = ("domain_generalization", "domain_adaptation")


def parser(
    description: str = "Trains one algorithm on one dataset.", more_flags: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """DomainBed's flags, then ours, which are off by default.

    Args:
        more_flags: of DomainBed's, which the caller adds.
    """
    p = DomainBedParser((*DOMAINBED_FLAGS, *more_flags), description=description)
    p.add_argument("--data_dir", help="directory of the datasets; the embedded ones need none")
    p.add_argument("--dataset", default="RotatedMNIST")
    p.add_argument("--algorithm", default="ERM")
    p.add_argument("--task", default=TASKS[0], choices=TASKS)
    p.add_argument("--hparams", help='JSON object that overrides hparams, like {"lr": 0.001}')
    p.add_argument("--hparams_seed", type=int, default=0, help="0: the defaults, else a random draw")
    p.add_argument("--trial_seed", type=int, default=0, help="of the splits, and of the draw of hparams")
    p.add_argument("--seed", type=int, default=0, help="of everything else")
    p.add_argument("--steps", type=int, help="number of updates; default: the dataset's")
    p.add_argument(
        "--checkpoint_freq", type=int, help="updates between two records; default: the dataset's, or one of --epochs"
    )
    p.add_argument("--test_envs", type=int, nargs="+", help="not trained on; default: the dataset's own, else 0")
    p.add_argument("--output_dir", default="train_output")
    p.add_argument("--holdout_fraction", type=float, default=0.2)
    p.add_argument("--uda_holdout_fraction", type=float, default=0, help="for domain adaptation")
    p.add_argument("--skip_model_save", action="store_true")
    p.add_argument("--save_model_every_checkpoint", action="store_true")
    _add_own_flags(p)
    return p


def _add_own_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--ranges",
        help='JSON object of how to draw hparams if --hparams_seed is not 0, like {"lr": "10^U(-4, -2)", '
        '"batch_size": "int 2^U(5, 7)", "resnet_dropout": [0.0, 0.5]}',
    )
    p.add_argument(
        "--epochs",
        type=int,
        help="passes over the training images, in place of --steps; one is ceil(images of the in-splits that are "
        "trained on / images that a step draws in all) steps (the epoch in the records is DomainBed's, counted by the "
        "smallest in-split)",
    )
    _add_choices(p)


def _add_choices(p: argparse.ArgumentParser) -> None:
    """The flags of ours that leave the length of a run and its draws alone."""
    p.add_argument("--partition", help="which examples share a minibatch; default: the algorithm's own")
    p.add_argument("--label", help="name of the row in tables")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    p.add_argument(
        "--eval_splits",
        choices=("all", "selection"),
        default="all",
        help="selection: leave out what nothing selects by",
    )
    p.add_argument(
        "--input_pipeline",
        choices=list(input_pipelines.REGISTRY),
        default=input_pipelines.DEFAULT,
        help="how image files are opened and augmented",
    )
    p.add_argument(
        "--confounders",
        nargs="+",
        help="whose product forms the groups, for datasets that know several; or inferred:METHOD, pseudo-confounders "
        "for training (docs/inferred_confounders.md)",
    )
    p.add_argument(
        "--annotation_budget", type=float, default=1.0, help="share of training images with a known confounder"
    )
    p.add_argument(
        "--validation_budget",
        type=float,
        default=1.0,
        help="share of validation images whose confounder selection may use; 0: it goes by the average accuracy",
    )
    p.add_argument("--mask_dir", help="folder of your own masks, in place of the dataset's (docs/datasets.md)")
    p.add_argument("--keep_best", choices=("aa_wga",), help="also keep the model that is best on validation")
    p.add_argument(
        "--explain",
        type=int,
        default=0,
        metavar="N",
        help="in the end, measure the explanations of N images of each test environment (docs/explanations.md)",
    )
    p.add_argument(
        "--save_every_s",
        type=seconds,
        default=snapshots.DEFAULT_SAVE_EVERY_S,
        metavar="S",
        help="seconds between two snapshots, from which a killed run goes on; at least 50 times as long as one takes; "
        "0: one after every update",
    )
    p.add_argument(
        "--log_to",
        nargs="+",
        default=[],
        metavar="TRACKER",
        help="also send the records to: tensorboard wandb mlflow (docs/loggers.md)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace another run in the output directory")


def resolve(args: dict[str, Any]) -> dict[str, Any]:
    """Checks names and numbers, fills in what the classes decide, and returns the hparams.

    Raises:
        NotImplementedError: no such algorithm, dataset or partition.
        ValueError: anything else that no run could be made of.
    """
    algorithm_class = get_algorithm_class(args["algorithm"])
    args |= {key: value for key, value in class_defaults(args).items() if args[key] is None}
    partitions.REGISTRY[args["partition"]]
    if method := pseudo_confounders(args):
        inferred_confounders.REGISTRY[method]
    _check_numbers(args)
    given, ranges = overrides.parse(args["hparams"]), overrides.parse_ranges(args["ranges"])
    names, optimizer = (args["algorithm"], args["dataset"]), given.get("optimizer", "adam")
    hparams_registry.check_given(algorithm_class, args["dataset"], given)
    hparams_registry.check_ranges(*names, ranges)
    if args["hparams_seed"] == 0:
        return hparams_registry.default_hparams(*names, optimizer) | given
    seed = seed_hash(args["hparams_seed"], args["trial_seed"])
    return hparams_registry.random_hparams(*names, seed, ranges, optimizer) | given


def _check_numbers(args: dict[str, Any]) -> None:
    for name in ("steps", "epochs", "checkpoint_freq", "holdout_fraction", "uda_holdout_fraction", "explain"):
        if args[name] is not None and args[name] < 0:
            raise ValueError(f"--{name} {args[name]}: must not be negative")
    for name in ("steps", "epochs", "checkpoint_freq"):
        if args[name] == 0:
            raise ValueError(f"--{name} 0: give 1 or more, or leave it out for the dataset's own")
    if args["steps"] is not None and args["epochs"] is not None:
        raise ValueError(f"--steps {args['steps']} and --epochs {args['epochs']}: give one of them")
    if not (args["holdout_fraction"] < 1 and args["uda_holdout_fraction"] < 1):  # NaN is none
        raise ValueError("--holdout_fraction and --uda_holdout_fraction are fractions below 1")


def class_defaults(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose default depends on the algorithm or the dataset."""
    algorithm_class, dataset_class = get_algorithm_class(args["algorithm"]), datasets.get_dataset_class(args["dataset"])
    test_envs = getattr(dataset_class, "TEST_ENVS", None) or [0]
    return {"partition": getattr(algorithm_class, "PARTITION", "environment"), "test_envs": list(test_envs)}


def completed(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an earlier run, with the default of each flag that train did not have then."""
    return vars(parser().parse_args([])) | class_defaults(args) | args


def defaults(args: dict[str, Any]) -> dict[str, Any]:
    """What the arguments would be had only algorithm and dataset been given."""
    found = vars(parser().parse_args([])) | class_defaults(args)
    return {key: value for key, value in found.items() if key in args}
