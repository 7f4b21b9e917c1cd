"""Feature files: what a network made of every image of a dataset, once, as a dataset of vectors; read without torch.

Such a file is an ``.npz`` archive without pickles. For environment e it holds ``x{e}`` (n, D) float32, ``y{e}`` (n,)
int64 and, where they are known, ``c{e}`` and ``units{e}`` (n,) int64; ``about`` is a JSON text that says the rest.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

VERSION = 1
_KINDS: dict[str, tuple[type, ...]] = {  # what ``about`` says
    "dataset": (str,), "featurizer": (str,), "hparams": (dict,), "dim": (int,), "num_classes": (int,),
    "classes": (list,), "confounders": (list,), "environments": (list,), "validation_envs": (list,),
    "test_envs": (list, type(None)),
}  # fmt: skip
_AGAIN = "write it with python -m domainbed.scripts.extract_features"


class Arrays(NamedTuple):
    """An environment: features x (n, D), labels y (n,), confounders c (n,) and split units (n,), None if not known."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    c: NDArray[np.int64] | None = None
    units: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """A feature file, of which only the text has been read.

    Attributes:
        about: what it says of the dataset (as a dataset class does), of the featurizer and of the hparams of both.
    """

    path: Path
    about: Mapping[str, Any]

    @functools.cached_property
    def class_attributes(self) -> dict[str, Any]:
        """What a dataset class declares that is made of this file and nothing else."""
        about = self.about
        return {
            "ENVIRONMENTS": tuple(about["environments"]),
            "VALIDATION_ENVS": tuple(about["validation_envs"]),
            "TEST_ENVS": None if about["test_envs"] is None else tuple(about["test_envs"]),
            "CLASSES": tuple(about["classes"]),
            "CONFOUNDERS": tuple(about["confounders"]),
            "NUM_CLASSES": about["num_classes"],
            "INPUT_SHAPE": (about["dim"],),
            "HPARAMS_SIZE": "small",  # a linear layer needs larger steps than a pretrained network
            "HPARAMS": {"backbone": "identity"},
            "NEEDS_DATA_DIR": False,
            "N_WORKERS": 0,
        }

    def environment(self, e: int) -> Arrays:
        """The arrays of an environment.

        Raises:
            ValueError: they are missing or damaged, or not what they should be.
        """
        needed = [f"x{e}", f"y{e}", *([f"c{e}"] if self.about["confounders"] else [])]
        found = _members(self.path, (*needed, f"units{e}"))
        if missing := [name for name in needed if name not in found]:
            raise ValueError(f"{self.path} lacks {', '.join(missing)}; {_AGAIN}")
        arrays = Arrays(found[f"x{e}"], found[f"y{e}"], found.get(f"c{e}"), found.get(f"units{e}"))
        if trouble := _trouble(arrays, self.about["dim"]):
            raise ValueError(f"{self.path}: environment {e}: {trouble}; {_AGAIN}")
        return arrays


def _trouble(arrays: Arrays, dim: int) -> str:
    """What is wrong with the arrays of an environment; empty if nothing is."""
    x = arrays.x
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != dim:
        return f"x is {x.shape} of {x.dtype}, not (n, {dim}) of float32"
    for name, values in arrays._asdict().items():
        if name != "x" and values is not None and (values.dtype != np.int64 or values.shape != x.shape[:1]):
            return f"{name} is {values.shape} of {values.dtype}, not ({len(x)},) of int64"
    if bad := np.flatnonzero(~np.isfinite(x).all(axis=1)).tolist():
        return f"{len(bad)} of {len(x)} rows of x hold values that are not finite, the first at {bad[0]}"
    return ""


def read(path: str | os.PathLike[str]) -> FeatureFile:
    """The file, from memory while it stays the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, or damaged.
    """
    path = Path(os.path.abspath(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_AGAIN}")
    stat = path.stat()
    return _read(path, (stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=8)
def _read(path: Path, _state: Any) -> FeatureFile:
    text = _members(path, ("about",)).get("about")
    if text is None or text.dtype.kind != "U" or text.ndim:
        raise ValueError(f"{path} has no text `about`, so it is no feature file; {_AGAIN}")
    try:
        about = json.loads(str(text))
    except ValueError as error:
        raise ValueError(f"{path}: `about` is no JSON ({error}); {_AGAIN}") from error
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else None
        raise ValueError(f"{path} is a feature file of version {version!r}, and version {VERSION} is read; {_AGAIN}")
    if wrong := [key for key, kinds in _KINDS.items() if key not in about or not isinstance(about[key], kinds)]:
        raise ValueError(f"{path}: `about` lacks or garbles {', '.join(wrong)}; {_AGAIN}")
    return FeatureFile(path, about)


def _members(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Those of the named arrays that the archive holds."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:  # np.load leaves damaged ones open
            return {name: archive[name] for name in names if name in archive.files}
    except OSError:
        raise
    except Exception as error:  # bytes that are no archive bring about any
        cause = " ".join(str(error).split())
        raise ValueError(f"{path} is no feature file, or is damaged ({cause}); {_AGAIN}") from error


def write(file: IO[bytes], about: Mapping[str, Any], environments: Sequence[Arrays]) -> None:
    """Writes a feature file.

    Args:
        file: open for writing.
        about: all that ``FeatureFile.about`` says but ``dim`` and the version.
        environments: one for each name in ``about["environments"]``; c is known of all, or of none.

    Raises:
        ValueError: features are not finite, or arrays don't fit together.
    """
    dim = environments[0].x.shape[1]
    members: dict[str, Any] = {}
    for e, arrays in enumerate(environments):
        if trouble := _trouble(arrays, dim):
            raise ValueError(f"environment {about['environments'][e]}: {trouble}")
        members |= {f"{name}{e}": values for name, values in arrays._asdict().items() if values is not None}
    text = json.dumps({**about, "dim": dim, "version": VERSION}, sort_keys=True)
    np.savez(file, about=np.array(text), **members)
