"""The models that runs left behind, ours and DomainBed's: where they lie, and how they come back to life.

A pickle may hold calls of any function, so only tensors and plain values are unpickled, unless the user says that a
file is trusted.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domainbed import hparams_registry, records
from domainbed.algorithms import get_algorithm_class
from domainbed.algorithms.base import Task, build
from domainbed.messages import listed
from domainbed.registry import PLUGINS_VARIABLE
from domainbed.training import BEST_MODEL_FILE, MODEL_FILE

_CHECKPOINT = re.compile(r"model_step(\d+)\.pkl")
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # as torch names what it does not load
_TRUST = "if you trust whoever made the file, say so: --trusted, in Python trusted=True"
_MOST = 2**24  # classes, or entries along a side of the input; no model has more
# What building a model from, or loading into it, the wrong values brings about.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def find(path: str | os.PathLike[str]) -> Path:
    """The model of a run's directory, the best one if it was kept and else the last; or the file that is named.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(path)
    if place.is_file():
        return place
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such run or model; name the output_dir of a run, or a model*.pkl in it")
    for name in (BEST_MODEL_FILE, MODEL_FILE):
        if (place / name).exists():
            return place / name
    if checkpoints := _checkpoints(place):
        head = f"{place} holds no {BEST_MODEL_FILE} and no {MODEL_FILE}, but checkpoints; name one of these files:"
        raise FileNotFoundError(listed(head, checkpoints))
    if not (place / records.RESULTS_FILE).exists():
        raise FileNotFoundError(f"{place} holds no run (no {records.RESULTS_FILE}); name the output_dir of one")
    raise FileNotFoundError(
        f"{place} holds no model: the run is unfinished, or was trained with --skip_model_save (sweep: "
        "--no_model_save); train it again without that, or with --keep_best or --explain"
    )


def _checkpoints(place: Path) -> list[str]:
    """The names of a directory's checkpoints, by their steps."""
    named = filter(None, (_CHECKPOINT.fullmatch(path.name) for path in place.glob("*.pkl")))
    return [found[0] for found in sorted(named, key=lambda found: int(found[1]))]


def usable(device: str | torch.device | None = None) -> torch.device:
    """The device if something can be computed there; of None a GPU if there is one, else the CPU.

    Raises:
        ValueError: it can't be used here.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=found).item()
    except Exception as error:  # each kind of device has its own
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {device} can't be used here ({cause}); take cpu") from error
    return found


class _Unfit(Exception):
    """A numpy scalar that is no hparam's; no UnpicklingError, of which torch rewrites the message."""


class _Dtype:
    """Stands for ``numpy.dtype`` in a pickle."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")

    def scalar(self, data: bytes) -> Any:
        if self.dtype.kind not in "biufU" or self.dtype.char == "g":
            raise _Unfit(f"a numpy scalar of {self.dtype}, which is no number of Python's and no text")
        return np.frombuffer(data, self.dtype)[0].item()


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    """Stands for what rebuilds a numpy scalar in a pickle, and gives Python's."""
    return dtype.scalar(data)


# DomainBed's random hparams are numpy scalars; the module that rebuilds them was renamed in numpy 2.
_HARMLESS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


_LOCK = threading.Lock()


@contextmanager
def _only_harmless() -> Iterator[None]:
    """Lets torch load ours alone: what it holds safe is one set for the process, where a user may have put others."""
    with _LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(_HARMLESS)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def load(path: str | os.PathLike[str], device: torch.device, trusted: bool = False) -> dict[str, Any]:
    """What ``training.save_model`` or DomainBed wrote, its tensors on the device, numpy scalars as Python's.

    Args:
        trusted: unpickle whatever the file holds; that may run code.

    Raises:
        ValueError: the file is no such model, or holds what only a trusted file may.
    """
    content = _trusted(path, device) if trusted else _harmless(path, device)
    if trouble := _trouble(content):
        raise ValueError(f"{path} is no model of train ({trouble}); name a model*.pkl")
    found: dict[str, Any] = content
    return found


def _trouble(content: Any) -> str:
    """What a model of train has and this has not, or has otherwise; empty if there is nothing."""
    if not isinstance(content, dict):
        return f"it holds no dict, but {type(content).__name__}"
    for key in ("args", "model_hparams", "model_dict"):
        if not isinstance(content.get(key), dict):
            return f"{key} is no dict"
    for key in ("algorithm", "dataset"):
        if not isinstance(content["args"].get(key), str):
            return f"args has no name of the {key}"
    shape = content.get("model_input_shape")
    if not isinstance(shape, list | tuple) or not shape or not all(map(_is_size, shape)):
        return f"model_input_shape is {shape!r}"
    if not _is_size(content.get("model_num_classes")):
        return f"model_num_classes is {content.get('model_num_classes')!r}"
    return _trouble_of_ours(content)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST


def _trouble_of_ours(content: dict[str, Any]) -> str:
    """The same of what only our models have, and older ones have not."""
    if not isinstance(content.get("task", {}), dict):
        return "task is no dict"
    if type(content.get("step", 0)) is not int:
        return f"step is {content['step']!r}"
    if type(content.get("normalised", False)) is not bool:
        return f"normalised is {content['normalised']!r}"
    names = content.get("class_names", [])
    return "" if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else "class_names"


def _harmless(path: str | os.PathLike[str], device: torch.device) -> Any:
    with _only_harmless():
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except OSError:
            raise
        except _Unfit as error:
            raise ValueError(f"{path} holds {error}, so it is not loaded; {_TRUST}") from error
        except Exception as error:  # bytes that are no pickle bring about any
            refused = _refused(path, str(error))
            if not refused:
                raise ValueError(f"{path} is no model of train, or is damaged; name a model*.pkl") from error
            raise ValueError(
                f"{path} holds {', '.join(refused)}, which may run code when it is loaded, so it is not; {_TRUST}"
            ) from error


def _refused(path: str | os.PathLike[str], message: str) -> list[str]:
    """The names of what a file holds besides tensors and plain values, as far as they can be told without loading."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # whatever is wrong with the file, the message is of its loading
        return _REFUSED.findall(message)[:1]


def _trusted(path: str | os.PathLike[str], device: torch.device) -> Any:
    try:
        return _plain(torch.load(path, map_location=device, weights_only=False))
    except OSError:
        raise
    except (AttributeError, ImportError) as error:
        raise ValueError(f"{path} holds an object of a class that is not here ({error}); add it to the path") from error
    except Exception as error:
        raise ValueError(f"{path} is no model of train, or is damaged; name a model*.pkl") from error


def _plain(value: Any) -> Any:
    """The same with Python's scalars for numpy's in its dicts, lists and tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: _plain(one) for key, one in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def restore(content: dict[str, Any], device: torch.device, trusted: bool = False) -> Any:
    """The algorithm with its weights, on the device; also of a model that DomainBed wrote, which has no task.

    That may have been trained on fewer minibatches than the class here trains on.

    No pretrained weights are looked for, since all are replaced.

    Args:
        trusted: build also a backbone whose code is fetched from the network, and run.

    Raises:
        NotImplementedError: there is no such algorithm.
        OSError: code can't be fetched.
        ValueError: the saved weights are not those of the class as it is now, or only a trusted model may be built.
    """
    name = content["args"]["algorithm"]
    algorithm_class = _algorithm_class(name)
    saved = content["model_hparams"] if "task" in content else _domainbeds_hparams(content)
    ours = {"pretrained": False, "fetch_code": trusted}
    hparams = {key: value for key, value in saved.items() if key != "weights"} | ours
    try:
        algorithm = _untrained(algorithm_class, content, hparams)
        algorithm.load_state_dict(content["model_dict"])
    except _MISFITS as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"the saved model does not fit {name} as it is now ({cause}); train it again") from error
    for key in ours:
        hparams.pop(key)
    hparams.update(saved)
    return algorithm.to(device)


def _algorithm_class(name: str) -> Any:
    try:
        return get_algorithm_class(name)
    except NotImplementedError as error:
        advice = f"if it is a class of your own, name its file in ${PLUGINS_VARIABLE}"
        raise NotImplementedError(f"{error}; {advice}") from error


def _untrained(algorithm_class: Any, content: dict[str, Any], hparams: dict[str, Any]) -> Any:
    if "task" in content:
        return build(algorithm_class, Task.from_dict(content["task"]), hparams)
    shape, *numbers = (content[f"model_{name}"] for name in ("input_shape", "num_classes", "num_domains"))
    return algorithm_class(tuple(shape), *numbers, hparams)


def _domainbeds_hparams(content: dict[str, Any]) -> dict[str, Any]:
    """The hparams as we mean them: a file of an older version lacks some, and AugMix's ResNet-50 won over ResNet-18."""
    args, saved = content["args"], content["model_hparams"]
    hparams = hparams_registry.default_hparams(args["algorithm"], args["dataset"]) | saved
    if saved.get("resnet50_augmix", False):
        hparams["resnet18"] = False
    return hparams


def step_of(path: str | os.PathLike[str], content: dict[str, Any]) -> int:
    """The step after which the model was written; -1 where neither it nor the records beside it say so."""
    if "step" in content:
        return int(content["step"])
    if named := _CHECKPOINT.fullmatch(Path(path).name):
        return int(named[1])
    results = Path(path).parent / records.RESULTS_FILE
    written = records.read(results)[0] if Path(path).name == MODEL_FILE and results.exists() else []
    return int(written[-1]["step"]) if written else -1
