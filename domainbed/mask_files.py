"""The user's own masks: files that lie as the images lie in their dataset, or an array for each environment."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domainbed.datasets.base import ImageEnvironment, MultipleDomainDataset, leaves, refuse_transforms
from domainbed.images import Images
from domainbed.messages import listed

SUFFIX = ".png"
BRIGHT = 128  # a level that masks reach on what should matter


def use(dataset: MultipleDomainDataset, folder: Path) -> None:
    """Gives every environment of a dataset the masks in a folder, in place of its own.

    Image files: ``a/b.jpg`` in the dataset's folder has the mask ``a/b.png``, or else ``a/b.jpg``; of any size, read as
    grey. Images in memory: environment e has ``env{e}.npy``, (N, H, W) uint8 or bool. White (255, True) should matter.

    Raises:
        FileNotFoundError: there is no such folder, or masks are missing in it.
        ValueError: masks can't be read or don't fit; the message lists the first ones and counts all.
        NotImplementedError: the images pass through a transform.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--mask_dir {folder}: no such folder")
    for environment in dataset:
        refuse_transforms(environment)
    files = [[leaf for leaf in leaves(env) if isinstance(leaf, ImageEnvironment)] for env in dataset]
    pools = mask_pools([leaf.images for some in files for leaf in some], folder)
    for leaf in (leaf for some in files for leaf in some):
        leaf.masks = pools[leaf.images]
    _use_arrays(dataset, [e for e, some in enumerate(files) if not some], folder)


def mask_pools(pools: Sequence[Images], folder: Path) -> dict[Images, Images]:
    """For each pool of image files that of their masks, after a look at all of them.

    Masks lie in the folder as the images lie in the nearest folder that holds all pools.

    Raises:
        FileNotFoundError, ValueError: see ``use``.
    """
    roots = {images: os.path.abspath(images.root) for images in pools}
    top = Path(os.path.commonpath(roots.values()) if roots else folder)
    beside = folder.resolve() == top.resolve()  # then an image's own path is no mask
    found, missing = {}, []
    for images, root in roots.items():
        names = [(Path(root).relative_to(top) / path).as_posix() for path in images.paths]
        paths = {name: _mask_path(name, folder, beside) for name in names}
        missing += [name for name, path in paths.items() if path is None]
        found[images] = Images(folder, tuple(paths[name] or name for name in names), images.size)
    if missing:
        head = (
            f"--mask_dir {folder}: {len(missing)} of {sum(map(len, found.values()))} masks are missing; a mask has the "
        )
        raise FileNotFoundError(
            listed(f"{head}path of its image in {top}, ending in {SUFFIX} or as it. None of:", missing)
        )
    for masks in found.values():
        _check_files(masks)
    return found


def _mask_path(name: str, folder: Path, beside: bool) -> str | None:
    """Where the mask of an image lies in the folder, in which the images may lie as well; None: nowhere."""
    candidates = (Path(name).with_suffix(SUFFIX).as_posix(), name)
    return next((c for c in candidates if not (beside and c == name) and (folder / c).is_file()), None)


def _check_files(masks: Images) -> None:
    try:
        masks.check()
    except ValueError as error:
        raise ValueError(f"--mask_dir {masks.root}: {error}") from error
    brightest = 0
    for k in np.random.default_rng(0).permutation(len(masks)):  # most often the first one will do
        brightest = max(brightest, int(np.asarray(masks.open(int(k)).convert("L")).max()))
        if brightest >= BRIGHT:
            return
    _check_levels(masks.root, brightest)


def _check_levels(folder: Path, brightest: int) -> None:
    if brightest < BRIGHT:
        raise ValueError(
            f"--mask_dir {folder}: no pixel of the masks is brighter than {brightest} of 255; what should matter is "
            "white (255, or True in an array of bool): scale them, or mend those that are empty"
        )


def _use_arrays(dataset: MultipleDomainDataset, environments: Sequence[int], folder: Path) -> None:
    arrays, problems = {}, []
    for e in environments:
        path = folder / f"env{e}.npy"
        try:
            arrays[e] = _read_array(path, (len(dataset[e]), *dataset.input_shape[1:]))
        except (OSError, ValueError, EOFError) as error:
            problems.append(f"{path.name}: {'no such file' if isinstance(error, FileNotFoundError) else error}")
    if problems:
        head = f"--mask_dir {folder}: the masks of {len(problems)} of {len(environments)} environments can't be used:"
        raise ValueError(listed(head, problems))
    if arrays:
        _check_levels(folder, max(map(_brightest, arrays.values())))
    for e, array in arrays.items():
        dataset[e].masks = array


def _read_array(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array, mapped into memory.

    Raises:
        OSError, ValueError, EOFError: it can't be read, or is not of the shape or the type of masks.
    """
    array: NDArray[Any] = np.load(path, mmap_mode="r")
    if array.shape != shape:
        raise ValueError(f"holds an array {array.shape}; the environment's masks are {shape}")
    if array.dtype not in (np.uint8, np.bool_):
        raise ValueError(f"holds {array.dtype}; store masks as uint8 (255: should matter) or bool")
    if 0 < _brightest(array) < BRIGHT:  # an empty array may stand for masks that nobody made
        raise ValueError(f"no pixel is brighter than {_brightest(array)} of 255, which is what should matter; scale it")
    return array


def _brightest(array: NDArray[Any]) -> int:
    return int(array.max(initial=0)) * (255 if array.dtype == bool else 1)
