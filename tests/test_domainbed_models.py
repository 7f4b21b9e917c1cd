"""DomainBed's models: names and shapes of all its algorithms' weights, recorded from facebookresearch/DomainBed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from domainbed import algorithms, hparams_registry, registry, saved_models

RECORDED = json.loads((Path(__file__).parent / "domainbed_output" / "state_dicts.json").read_text("utf-8"))
CPU = torch.device("cpu")
MEMBERS = (("featurizer.", "featurizer_label."), ("classifier.", "classifier_label_1."))  # of a ``network``


def recorded(name: str) -> dict[str, list[Any]]:
    return RECORDED["fresh"][name] | RECORDED["after_3_updates"].get(name, {})


def described(state: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    kinds = {torch.float32: [], torch.int64: ["int64"], torch.float64: ["float64"]}
    return {name: kinds[value.dtype] + list(value.shape) for name, value in state.items()}


def weights(shapes: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    """Random weights, the same ones where a module has two names."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        kind, size = (shape[0], shape[1:]) if shape and isinstance(shape[0], str) else ("float32", shape)
        value = torch.rand(size, generator=generator) - 0.5 * ("running_var" not in name)
        twins = [name.replace(f"network.{i}.", twin) for i, names in enumerate(MEMBERS) for twin in names]
        known = [found[twin] for twin in twins if twin in found]
        found[name] = known[0] if known else (value / 5).to(getattr(torch, kind))
    return found


def model(path: Path, name: str, shapes: dict[str, list[Any]], input_shape: tuple[int, ...], **hparams: Any) -> Path:
    """A model.pkl as DomainBed writes it."""
    hparams = hparams_registry.default_hparams(name, "Debug28") | {"batch_size": 8} | hparams
    content = {"args": {"algorithm": name, "dataset": "Debug28"}, "model_input_shape": input_shape}
    content |= {"model_num_classes": 3, "model_num_domains": 3, "model_hparams": hparams}
    torch.save(content | {"model_dict": weights(shapes)}, path)
    return path


@pytest.mark.parametrize("name", registry.order("algorithms"))
def test_names_and_shapes_of_all_weights_are_domainbeds(name: str) -> None:
    hparams = hparams_registry.default_hparams(name, "Debug28") | {"batch_size": 8}
    algorithm = algorithms.get_algorithm_class(name)((2, 28, 28), 3, 3, hparams)
    assert described(algorithm.state_dict()) == recorded(name)


@pytest.mark.parametrize("name", registry.order("algorithms"))
def test_a_model_of_domainbed_loads_and_predicts(tmp_path: Path, name: str) -> None:
    for shapes in (RECORDED["fresh"][name], recorded(name)):  # before the first update, and after some
        content = saved_models.load(model(tmp_path / "model.pkl", name, shapes, (2, 28, 28)), CPU)
        algorithm = saved_models.restore(content, CPU)
        loaded, given = algorithm.state_dict(), content["model_dict"]
        common = [key for key in given if given[key].shape == loaded[key].shape]
        assert len(common) >= len(given) - 1  # GroupDRO's empty q
        assert all(torch.equal(loaded[key], given[key]) for key in common)
        assert torch.isfinite(algorithm.eval().predict(torch.rand(4, 2, 28, 28))).all()


def test_a_model_of_one_environment_loads(tmp_path: Path) -> None:
    shapes = RECORDED["fresh"]["CORAL"]
    content = saved_models.load(model(tmp_path / "model.pkl", "CORAL", shapes, (2, 28, 28)), CPU)
    assert saved_models.restore(content | {"model_num_domains": 1}, CPU).MIN_PARTS == 2


@pytest.mark.parametrize(
    ("key", "side", "hparams"),
    [("ERM_32", 32, {}), ("ERM_224_resnet18", 224, {"resnet18": True, "resnet50_augmix": False, "pretrained": False})],
)
def test_other_sizes_of_images_load(tmp_path: Path, key: str, side: int, hparams: dict[str, Any]) -> None:
    path = model(tmp_path / "model.pkl", "ERM", RECORDED[key], (3, side, side), **hparams)
    content = saved_models.load(path, CPU)
    algorithm = saved_models.restore(content, CPU)
    assert described(algorithm.state_dict()) == RECORDED[key]
    assert torch.isfinite(algorithm.eval().predict(torch.rand(2, 3, side, side))).all()
