"""The models that runs left behind: where they lie, and how they come back to life."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from domainbed import records
from domainbed.algorithms.base import Task, build
from domainbed.training import BEST_MODEL_FILE, MODEL_FILE


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
    if not (place / records.RESULTS_FILE).exists():
        raise FileNotFoundError(f"{place} holds no run (no {records.RESULTS_FILE}); name the output_dir of one")
    raise FileNotFoundError(
        f"{place} holds no model: the run is unfinished, or was trained with --skip_model_save (sweep: "
        "--no_model_save); train it again without that, or with --keep_best or --explain"
    )


def load(path: str | os.PathLike[str], device: torch.device) -> dict[str, Any]:
    """What ``training.save_model`` wrote, its tensors on the device.

    Raises:
        ValueError: the file is no such model.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no model of train, is damaged, or holds more than tensors and plain numbers (as DomainBed's of "
            "random hparams), which is not loaded; name a model*.pkl"
        ) from error
    if not isinstance(content, dict) or not {"args", "model_hparams", "model_dict"} <= content.keys():
        raise ValueError(f"{path} is no model of train; name a model*.pkl")
    return content


def restore(content: dict[str, Any], algorithm_class: Any, device: torch.device) -> Any:
    """The algorithm with its weights, on the device; also of a model that DomainBed wrote, which has no task."""
    task = Task.from_dict(content["task"]) if "task" in content else _domainbeds(content)
    algorithm = build(algorithm_class, task, content["model_hparams"]).to(device)
    algorithm.load_state_dict(content["model_dict"])
    return algorithm


def _domainbeds(content: dict[str, Any]) -> Task:
    shape, *numbers = (content[f"model_{name}"] for name in ("input_shape", "num_classes", "num_domains"))
    return Task(tuple(shape), *numbers)


def step_of(path: str | os.PathLike[str], content: dict[str, Any]) -> int:
    """The step after which the model was written; -1 where neither it nor the records beside it say so."""
    if "step" in content:
        return int(content["step"])
    results = Path(path).parent / records.RESULTS_FILE
    written = records.read(results)[0] if Path(path).name == MODEL_FILE and results.exists() else []
    return int(written[-1]["step"]) if written else -1
