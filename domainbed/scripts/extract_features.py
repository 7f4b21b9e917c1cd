"""Writes the features that a frozen network makes of a dataset's images to a file that is a dataset of its own.

    python -m domainbed.scripts.extract_features --dataset Waterbirds --data_dir D \
        --hparams '{"backbone": "efficientnet_lite0", "image_size": 128}' --output features/waterbirds.npz
    python -m domainbed.scripts.train --dataset features/waterbirds.npz --algorithm GroupDRO --partition group

Images are as evaluation sees them, never augmented; the network is in evaluation mode.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from domainbed import feature_files, hparams_registry, input_pipelines, overrides, run_directory, saved_models
from domainbed.algorithms import get_algorithm_class
from domainbed.datasets.base import confounders
from domainbed.feature_files import Arrays
from domainbed.feature_maps import evaluating
from domainbed.features import penultimate
from domainbed.loaders import evaluation_batches
from domainbed.networks import Featurizer
from domainbed.scripts import bad_input, run_cli, subjects
from domainbed.scripts.arguments import DomainBedParser, add_trusted
from domainbed.scripts.describe import BASELINE
from domainbed.scripts.train_arguments import completed
from domainbed.scripts.train_building import build_data, device

SUFFIX = ".npz"


@dataclass(frozen=True)
class Source:
    """What features are made of, and by what.

    Attributes:
        dataset: its name.
        data: the dataset itself.
        features: opens to images (B, C, H, W) -> (B, D).
        featurizer: which network that is, in words.
        hparams: of dataset and network.
    """

    dataset: str
    data: Any
    features: AbstractContextManager[Callable[[Tensor], Tensor]]
    featurizer: str
    hparams: dict[str, Any]


def parser() -> argparse.ArgumentParser:
    p = DomainBedParser(("dataset", "data_dir", "hparams"), description=__doc__.splitlines()[0])
    of = p.add_mutually_exclusive_group(required=True)
    of.add_argument("--dataset", help="whose images a pretrained network sees: a name, or the path of a CSV file")
    of.add_argument("--model", metavar="RUN", help="the network of this run (or model*.pkl), on its run's dataset")
    p.add_argument("--data_dir", help="directory of the datasets; the embedded ones need none")
    p.add_argument("--hparams", help='JSON object that names the network, like {"backbone": "resnet50"}')
    p.add_argument("--seed", type=int, help="of datasets that are drawn at random, and of random weights; default: 0")
    p.add_argument("--confounders", nargs="+", help="whose product forms the groups, for datasets that know several")
    p.add_argument("--input_pipeline", choices=list(input_pipelines.REGISTRY), help="how image files are opened")
    p.add_argument("--output", required=True, metavar=f"FILE{SUFFIX}", help="the file of features")
    p.add_argument("--overwrite", action="store_true", help="replace that file")
    add_trusted(p)
    return p


def main(argv: Sequence[str]) -> int:
    """Writes the file; returns the exit status."""
    args = vars(parser().parse_args(argv))
    started = time.monotonic()
    with bad_input():
        output = output_file(args["output"], args["overwrite"])
        source = of_run(args) if args["model"] else of_dataset(args)
    with source.features as features:
        environments = [extract(source.data, e, features) for e in range(len(source.data))]
    about = about_features(source)
    with bad_input(), run_directory.whole(output) as file:
        feature_files.write(file, about, environments)
    for name, arrays in zip(about["environments"], environments, strict=True):
        print(f"{name}: {len(arrays.y)} images")
    n, dim = sum(len(arrays.y) for arrays in environments), environments[0].x.shape[1]
    print(f"Wrote {output}: {n} x {dim} features by {source.featurizer}, in {time.monotonic() - started:.1f} s")
    return 0


def output_file(name: str, overwrite: bool) -> Path:
    """Where the features go; makes the folder.

    Raises:
        ValueError: the name does not end as it must to be a dataset's.
        FileExistsError: the file is there.
    """
    output = Path(name)
    if output.suffix != SUFFIX:
        raise ValueError(f"--output {name}: the name must end in {SUFFIX}, by which train knows such a file")
    if output.exists() and not overwrite:
        raise FileExistsError(f"--output {name} is there already; name another file, or pass --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def of_dataset(args: dict[str, Any]) -> Source:
    """A dataset and the pretrained network that the hparams name.

    Raises:
        ValueError, OSError, NotImplementedError, ImportError: one of them can't be had.
    """
    name = args["dataset"]
    given = overrides.parse(args["hparams"])
    hparams_registry.check_given(get_algorithm_class(BASELINE), name, given)
    hparams = hparams_registry.default_hparams(BASELINE, name) | given | {"data_augmentation": False}
    own = {key: args[key] for key in ("data_dir", "seed", "confounders", "input_pipeline") if args[key] is not None}
    data, _ = build_data(completed({"algorithm": BASELINE, "dataset": name, **own}), hparams)
    featurizer = Featurizer(data.input_shape, hparams).to(device())
    words = f"{hparams.get('backbone') or type(featurizer).__name__}, as it is before training"
    return Source(name, data, frozen(featurizer), words, hparams)


@contextmanager
def frozen(featurizer: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """The featurizer in evaluation mode and without graph."""
    with evaluating(featurizer), torch.no_grad():
        yield featurizer


def of_run(args: dict[str, Any]) -> Source:
    """A run's dataset and what its network gives to its last linear layer.

    Raises:
        ValueError, OSError, NotImplementedError: one of them can't be had, or a flag is the run's to say.
    """
    for flag in ("hparams", "seed"):
        if args[flag] is not None:
            raise ValueError(f"--{flag} is for --dataset; with --model, the run's own holds")
    own = {key: args[key] for key in ("data_dir", "confounders", "input_pipeline")}
    subject = subjects.open_subject(saved_models.find(args["model"]), own, args["trusted"])
    words = f"{subject.args['algorithm']} trained on {subject.args['dataset']} ({subject.where})"
    hparams = dict(getattr(subject.algorithm, "hparams", {}))
    return Source(subject.args["dataset"], subject.dataset, penultimate(subject.algorithm), words, hparams)


def extract(data: Any, e: int, features: Callable[[Tensor], Tensor]) -> Arrays:
    """All images of an environment as features, in their order, with what is known of them."""
    environment = data[e]
    keys = np.arange(len(environment), dtype=np.int64)
    batches = evaluation_batches(environment, keys, data.N_WORKERS, device())
    found = [(features(x).float().cpu().numpy(), y.cpu().numpy()) for x, y in batches]
    x, y = (np.concatenate(column) for column in zip(*found, strict=True))
    c = confounders(environment) if data.num_confounders > 1 else None
    units = getattr(environment, "split_units", None)
    return Arrays(x, y.astype(np.int64), c, None if units is None else np.asarray(units, dtype=np.int64))


def about_features(source: Source) -> dict[str, Any]:
    """What the file says of the dataset and the network."""
    data = source.data
    return {
        "dataset": source.dataset,
        "featurizer": source.featurizer,
        "hparams": source.hparams,
        "num_classes": data.num_classes,
        "classes": list(map(str, data.CLASSES)),
        "confounders": list(map(str, data.CONFOUNDERS)) if data.num_confounders > 1 else [],
        "environments": [str(name) for name in data.ENVIRONMENTS or range(len(data))],
        "validation_envs": list(data.VALIDATION_ENVS),
        "test_envs": None if data.TEST_ENVS is None else list(data.TEST_ENVS),
    }


if __name__ == "__main__":
    run_cli(main)
