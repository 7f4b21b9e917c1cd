"""Saves some images of every environment of each dataset whose files are there, to look at.

    python -m domainbed.scripts.save_images --data_dir data --output_dir images

Images are as evaluation sees them: resized, never augmented. ``describe`` makes one picture of a dataset instead.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from domainbed import datasets, hparams_registry, input_pipelines, releases, run_directory
from domainbed.datasets.archives import ARCHIVES
from domainbed.datasets.base import MultipleDomainDataset
from domainbed.lib.misc import known_array
from domainbed.scripts import BadInput, bad_input, run_cli
from domainbed.scripts.arguments import DomainBedParser
from domainbed.scripts.describe import BASELINE, picture
from domainbed.scripts.train_building import build_dataset, seed_everything

logger = logging.getLogger(__name__)


def parser() -> DomainBedParser:
    p = DomainBedParser(["data_dir", "output_dir"], description=__doc__.splitlines()[0])
    p.add_argument("--data_dir", help="directory of the datasets; without it, only the embedded ones")
    p.add_argument("--output_dir", required=True, help="where the images go")
    p.add_argument("--dataset", nargs="+", metavar="NAME", help="only these; they must be there")
    p.add_argument("--images", type=int, default=50, help="of each environment, at most")
    p.add_argument("--seed", type=int, default=0, help="of the choice, and of datasets that are drawn at random")
    return p


def main(argv: Sequence[str]) -> int:
    """Saves the images; returns the exit status.

    Raises:
        BadInput: a dataset that is asked for is unknown or not there, or nothing can be written.
    """
    args = vars(parser().parse_args(argv))
    if args["images"] < 1:
        raise BadInput(f"--images {args['images']}: give 1 or more")
    asked = args["dataset"] or [name for name in datasets.DATASETS if args["data_dir"] or _embedded(name)]
    with bad_input():
        for name in asked:
            datasets.get_dataset_class(name)
        if args["data_dir"] is not None and not Path(args["data_dir"]).is_dir():
            raise FileNotFoundError(f"--data_dir {args['data_dir']} is no directory; name that of the datasets")
        run_directory.prepare(args["output_dir"])
        output = Path(args["output_dir"])
    for name in asked:
        _save_if_there(name, output, args, needed=args["dataset"] is not None)
    return 0


def _embedded(name: str) -> bool:
    return not datasets.get_dataset_class(name).NEEDS_DATA_DIR


def _save_if_there(name: str, output: Path, args: dict[str, Any], needed: bool) -> None:
    """Saves a dataset's images and says how many; one that is not there is an error if it is needed."""
    try:
        with bad_input():
            saved = sum(1 for _ in save(name, output, args))
    except BadInput as error:
        if needed:
            raise BadInput(f"{name}: {error}") from error
        print(f"{name}: skipped: {str(error).splitlines()[0]}")
    else:
        print(f"{name}: {saved} images")


def save(name: str, output: Path, args: dict[str, Any]) -> Iterator[Path]:
    """Writes ``DATASET_env0NAME_3_idx17_class1.png``, the fourth of the images chosen of the first environment.

    Raises:
        FileNotFoundError, ValueError, ImportError: the dataset is not there, or not as it should be.
    """
    dataset = build(name, args)
    rng = random.Random(f"{name} {args['seed']}")
    for e, environment in enumerate(dataset):
        label = (dataset.ENVIRONMENTS or [""] * len(dataset))[e].replace("/", "-")
        chosen = rng.sample(range(len(environment)), min(args["images"], len(environment)))
        for i, key in enumerate(chosen):
            path = output / f"{name}_env{e}{label}_{i}_idx{key}_class{_label(environment, key)}.png"
            picture(environment, key).save(path)
            yield path


def _label(environment: Any, key: int) -> int:
    known = known_array(environment, "y")
    return int(environment[key][1] if known is None else known[key])


def build(name: str, args: dict[str, Any]) -> MultipleDomainDataset:
    """The dataset, all of whose environments count as test environments, so that none is augmented.

    Raises:
        FileNotFoundError, ValueError, ImportError: see ``save``.
    """
    data_dir, release = args["data_dir"], ARCHIVES.get(name)
    if data_dir is not None and release is not None:  # a look first: some datasets would download what is missing
        folder = releases.place(release, Path(data_dir))
        if missing := [entry for entry in release.contains if not (folder / entry).exists()]:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    seed_everything(args["seed"])
    test_envs = list(range(datasets.num_environments(name)))
    settings = {"dataset": name, "data_dir": data_dir, "test_envs": test_envs, "confounders": None}
    dataset: MultipleDomainDataset = build_dataset(settings, hparams_registry.default_hparams(BASELINE, name))
    dataset.use_input_pipeline(input_pipelines.DEFAULT)
    return dataset


if __name__ == "__main__":
    run_cli(main)
