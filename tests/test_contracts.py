"""What every registered thing keeps to: algorithms on every partition, datasets, partitions, similarities."""

import functools
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from domainbed import (
    algorithms,
    datasets,
    hparams_registry,
    networks,
    partitions,
    registry,
    similarities,
    snapshots,
    state_trees,
)
from domainbed.algorithms.base import Task
from domainbed.explainers import Explainer
from domainbed.feature_maps import evaluating
from domainbed.loaders import TrainingLoader
from domainbed.splits import Split, split_environments, training_splits

EMBEDDED = ["Debug28", "ColoredDigits", "DigitsO2O", "DigitsM2M", "DigitsSubpop"]


SWITCH = re.compile("warmup|iters|linear_steps")  # hparams that say after how many updates something changes


class StandIn(nn.Module):
    """Small backbone for 224 px: (B, C, 224, 224) -> (B, 8), maps of 14 x 14."""

    n_outputs = 8

    def __init__(self, channels: int):
        super().__init__()
        self.patches, self.map_layer = nn.Conv2d(channels, 8, 16, stride=16), nn.ReLU()
        self.activation: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.map_layer(self.patches(x)).mean((2, 3)))


@pytest.fixture(scope="module", autouse=True)
def stand_in() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.BACKBONES._entries, "stand_in", lambda shape, _: StandIn(shape[0]))
        yield


@functools.cache
def splits_of(size: int) -> list[Split]:
    torch.manual_seed(0)
    dataset = datasets.get_dataset_class(f"Debug{size}")(None, [0], {})
    for environment in dataset:
        environment.masks = np.arange(size) < np.full((len(environment), size, 1), size // 2)  # for those that need any
    return training_splits(dataset, split_environments(dataset, [0], 0.2), [0])


def hparams_of(name: str, size: int = 28) -> dict[str, Any]:
    own = {"batch_size": 8, "backbone": "small_cnn"} if size == 28 else {"batch_size": 4, "backbone": "stand_in"}
    hparams = hparams_registry.default_hparams(name, f"Debug{size}") | own
    return {key: 1 if value and SWITCH.search(key) else value for key, value in hparams.items()}  # and what comes after


def build(name: str, partition: str, size: int = 28) -> tuple[Any, TrainingLoader]:
    hparams = hparams_of(name, size)
    with_masks = algorithms.get_algorithm_class(name).NEEDS_MASKS
    loader = TrainingLoader(
        splits_of(size), partitions.REGISTRY[partition], hparams["batch_size"], 2, with_masks=with_masks
    )
    counts = loader.group_counts(2), 10, tuple(len(part.positions) for part in loader.parts), loader.hidden_counts(2)
    task = Task((3, size, size), 2, len(loader.parts), 2, *counts)
    torch.manual_seed(0)
    np.random.seed(0)
    return algorithms.get_algorithm_class(name).from_task(task, hparams), loader


def train(name: str, partition: str, size: int) -> tuple[Any, list[dict[str, Any]]]:
    """The algorithm after three updates, and what they returned."""
    algorithm, loader = build(name, partition, size)
    return algorithm, [algorithm.update(minibatches, None) for minibatches in islice(loader, 3)]


TRIALS = [
    # ARM's own network works on all pixels: half a minute each at 224 px
    pytest.param(
        name, partition, size, marks=[pytest.mark.slow] * ((name, size) == ("ARM", 224) and partition != "environment")
    )
    for name in algorithms.ALGORITHMS
    for partition in partitions.REGISTRY
    for size in (28, 224)
    if partition not in ("group_subset", "label_subset")  # one minibatch, as random
    if size == 28 or partition != "label"
]


@pytest.mark.parametrize(("name", "partition", "size"), TRIALS)
def test_three_updates_or_a_clear_error(name: str, partition: str, size: int) -> None:
    """Finite plain numbers, the same for equal seeds, and weights that load into a fresh instance."""
    if algorithms.get_algorithm_class(name).MIN_PARTS > 1 and partition in partitions.SINGLE_PART:
        with pytest.raises(ValueError, match=f"{name} compares at least 2 minibatches"):
            build(name, partition, size)
        return
    (algorithm, values), (again, same_values) = (train(name, partition, size) for _ in range(2))
    assert json.loads(json.dumps(values)) == values == same_values
    assert all(np.isfinite(list(step.values())).all() for step in values)
    state = algorithm.state_dict()
    assert all(torch.equal(*pair) for pair in zip(state.values(), again.state_dict().values(), strict=True))
    assert all(torch.isfinite(value).all() for value in state.values())
    fresh, _ = build(name, partition, size)
    fresh.load_state_dict(state)
    x, _ = splits_of(size)[0].environment[torch.arange(5)]
    algorithm.eval(), fresh.eval()
    logits = algorithm.predict(x)
    assert logits.shape == (5, 2)
    assert torch.isfinite(logits).all()
    assert torch.equal(fresh.predict(x), logits)


def last_maps(algorithm: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``predict``'s logits of images, and the last maps that any module gives on the way to them."""
    maps: list[torch.Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            maps.append(output)

    handles = [module.register_forward_hook(note) for module in algorithm.modules()]
    logits = algorithm.predict(x)
    for handle in handles:
        handle.remove()
    return logits, maps[-1]


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_heatmaps_follow_from_what_predict_runs(name: str) -> None:
    """Grad-CAM at the last maps, by the gradient of each image's own logit; all weights differ, copies' too."""
    algorithm, _ = build(name, "environment")
    generator = torch.Generator().manual_seed(1)
    for parameter in algorithm.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    explainer = Explainer(algorithm)
    explainer.check((3, 28, 28))
    x, _ = splits_of(28)[0].environment[torch.arange(5)]
    with evaluating(algorithm):
        given_logits, heatmaps = explainer.heatmaps(x)
        logits, maps = last_maps(algorithm, x)
        masks = explainer.mask(x)
    slopes = [torch.autograd.grad(own.max(), maps, retain_graph=True)[0][i] for i, own in enumerate(logits)]
    expected = (torch.stack(slopes).mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu()
    assert expected.any()
    assert masks is None or masks.shape == (5, 28, 28)
    assert torch.equal(given_logits, logits)
    torch.testing.assert_close(heatmaps, expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_snapshot_goes_on_in_a_fresh_instance(name: str, tmp_path: Path) -> None:
    """Two updates, a file, two more; the fresh instance comes with other weights and random numbers of its own."""
    whole, loader = build(name, "group")
    minibatches = list(islice(loader, 4))
    for step in minibatches[:2]:
        whole.update(step, None)
    torch.save([state_trees.capture(whole), snapshots.random_states()], tmp_path / "file")
    values = [whole.update(step, None) for step in minibatches[2:]]

    fresh, _ = build(name, "group")
    tree, states = torch.load(tmp_path / "file", weights_only=True)
    fresh.update(minibatches[3], None)
    state_trees.restore(tree, fresh)
    snapshots.set_random_states(states)
    assert [fresh.update(step, None) for step in minibatches[2:]] == values
    ours, theirs = fresh.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_hparams_are_plain_json_and_declared(name: str) -> None:
    assert "HPARAMS" in vars(algorithms.get_algorithm_class(name)), "so that misspelt hparams are an error"
    for hparams in (hparams_of(name), hparams_registry.random_hparams(name, "Debug28", 3)):
        assert json.loads(json.dumps(hparams)) == hparams


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_algorithms_name_their_source_and_their_hparams(name: str) -> None:
    cls = algorithms.get_algorithm_class(name)
    text = "".join(base.__doc__ or "" for base in cls.__mro__[:-1])
    assert "Source:" in text
    assert cls.__doc__
    assert all(hparam in text for hparam in cls.HPARAMS)


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_datasets_name_source_licence_and_layout(name: str) -> None:
    cls = datasets.get_dataset_class(name)
    text = cls.__doc__ or ""
    assert "Source:" in text
    assert "Licence:" in text
    assert "Layout:" in text
    assert cls.ENVIRONMENTS


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_datasets_keep_the_protocol(name: str) -> None:
    cls = datasets.get_dataset_class(name)
    torch.manual_seed(0)
    dataset = cls(None, [0], {})
    assert not cls.NEEDS_DATA_DIR
    assert len(dataset) == len(cls.ENVIRONMENTS or ()) == datasets.num_environments(name)
    for environment in dataset:
        x, y = environment[0]
        assert x.shape == dataset.input_shape
        assert x.dtype == torch.float32
        assert len(environment) == len(environment.y) == len(environment.c)
        assert int(y) == environment.y[0] < dataset.num_classes
        assert 0 <= environment.c.min() <= environment.c.max() < dataset.num_confounders


def test_attributes_that_domainbeds_users_read() -> None:
    assert datasets.SpawriousBenchmark.input_shape == (3, 224, 224)


def test_everything_is_imported_by_a_star() -> None:
    names: dict[str, Any] = {}
    exec("from domainbed.algorithms import *", names)
    assert {*algorithms.ALGORITHMS, "AbstractMMD", "EX2L", "torch", "F", "random_pairs_of_minibatches"} <= names.keys()


def test_unknown_names_are_explained() -> None:
    with pytest.raises(NotImplementedError, match="algorithm not found: GroupDR0; did you mean GroupDRO"):
        algorithms.get_algorithm_class("GroupDR0")
    with pytest.raises(NotImplementedError, match="dataset not found: DigitsM2N; did you mean DigitsM2M"):
        datasets.get_dataset_class("DigitsM2N")
    with pytest.raises(NotImplementedError, match="dataset not found: SpawriousBenchmark"):
        datasets.get_dataset_class("SpawriousBenchmark")
    with pytest.raises(NotImplementedError, match="partition not found: groups; did you mean group"):
        partitions.REGISTRY["groups"]
    with pytest.raises(NotImplementedError, match="algorithm not found: np"):
        algorithms.get_algorithm_class("np")


def test_names_that_domainbeds_users_import() -> None:
    bodies = "networks torch nn F autograd np copy OrderedDict random_pairs_of_minibatches "  # used by pasted classes
    bodies += "split_meta_train_test ParamDict MovingAverage l2_between_dicts proj Nonparametric SupConLossLambda "
    bodies += "ErmPlusPlusMovingAvg LARS"
    for name in f"Algorithm ERM IRM AbstractDANN AbstractMMD ALGORITHMS get_algorithm_class {bodies}".split():
        assert hasattr(algorithms, name), name
    bases = "MultipleDomainDataset MultipleEnvironmentMNIST MultipleEnvironmentImageFolder Debug WILDSDataset "
    bases += "WILDSEnvironment SpawriousBenchmark CustomImageFolder " + " ".join(registry.order("datasets"))
    for name in f"DATASETS get_dataset_class num_environments ColoredMNIST {bases}".split():
        assert hasattr(datasets, name), name


@pytest.mark.parametrize("name", list(similarities.REGISTRY))
def test_similarities_give_one_finite_score_per_image(name: str) -> None:
    maps = torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    score = similarities.REGISTRY[name](maps, maps.detach().flip(0))
    assert score.shape == (4,)
    (gradient,) = torch.autograd.grad(score.sum(), maps)
    assert torch.isfinite(gradient).all()
