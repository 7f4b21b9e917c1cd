"""What every registered thing keeps to: algorithms on every partition, datasets, partitions, similarities."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domainbed import algorithms, datasets, hparams_registry, partitions, registry, similarities, snapshots, state_trees
from domainbed.algorithms.base import Task
from domainbed.loaders import TrainingLoader
from domainbed.splits import Split, split_environments, training_splits

EMBEDDED = ["Debug28", "ColoredDigits", "DigitsO2O", "DigitsM2M", "DigitsSubpop"]


@pytest.fixture(scope="module")
def splits() -> list[Split]:
    torch.manual_seed(0)
    dataset = datasets.get_dataset_class("Debug28")(None, [0], {})
    for environment in dataset:
        environment.masks = np.arange(28) < np.full((len(environment), 28, 1), 14)  # for those that need masks
    return training_splits(dataset, split_environments(dataset, [0], 0.2), [0])


def hparams_of(name: str) -> dict[str, Any]:
    hparams = hparams_registry.default_hparams(name, "Debug28") | {"batch_size": 8, "backbone": "small_cnn"}
    return {key: 1 if "warmup" in key and value else value for key, value in hparams.items()}  # and what comes after


def build(name: str, partition: str, splits: list[Split]) -> tuple[Any, TrainingLoader]:
    hparams = hparams_of(name)
    with_masks = algorithms.get_algorithm_class(name).NEEDS_MASKS
    loader = TrainingLoader(splits, partitions.REGISTRY[partition], hparams["batch_size"], 2, with_masks=with_masks)
    task = Task((3, 28, 28), 2, len(loader.parts), 2, loader.group_counts(2))
    torch.manual_seed(0)
    np.random.seed(0)
    return algorithms.get_algorithm_class(name).from_task(task, hparams), loader


def train(name: str, partition: str, splits: list[Split]) -> tuple[Any, list[dict[str, Any]]]:
    """The algorithm after three updates, and what they returned."""
    algorithm, loader = build(name, partition, splits)
    return algorithm, [algorithm.update(minibatches, None) for minibatches in islice(loader, 3)]


@pytest.mark.parametrize("partition", list(partitions.REGISTRY))
@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_three_updates_on_every_partition_or_a_clear_error(name: str, partition: str, splits: list[Split]) -> None:
    if algorithms.get_algorithm_class(name).MIN_PARTS > 1 and partition == "random":
        with pytest.raises(ValueError, match=f"{name} compares at least 2 minibatches"):
            build(name, partition, splits)
        return
    algorithm, values = train(name, partition, splits)
    json.dumps(values)  # plain numbers
    assert all(np.isfinite(list(step.values())).all() for step in values)
    assert all(torch.isfinite(parameter).all() for parameter in algorithm.parameters())
    x, _ = splits[0].environment[torch.arange(5)]
    algorithm.eval()
    logits = algorithm.predict(x)
    assert logits.shape == (5, 2)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_equal_seeds_give_equal_runs(name: str, splits: list[Split]) -> None:
    (a, a_values), (b, b_values) = (train(name, "group", splits) for _ in range(2))
    assert a_values == b_values
    assert all(torch.equal(*pair) for pair in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_state_dicts_load_into_a_fresh_instance(name: str, splits: list[Split]) -> None:
    trained, _ = train(name, "group", splits)
    fresh, _ = build(name, "group", splits)
    fresh.load_state_dict(trained.state_dict())
    x, _ = splits[0].environment[torch.arange(5)]
    trained.eval(), fresh.eval()
    assert torch.equal(trained.predict(x), fresh.predict(x))


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_snapshot_goes_on_in_a_fresh_instance(name: str, splits: list[Split], tmp_path: Path) -> None:
    """Two updates, a file, two more; the fresh instance comes with other weights and random numbers of its own."""
    whole, loader = build(name, "group", splits)
    minibatches = list(islice(loader, 4))
    for step in minibatches[:2]:
        whole.update(step, None)
    torch.save([state_trees.capture(whole), snapshots.random_states()], tmp_path / "file")
    values = [whole.update(step, None) for step in minibatches[2:]]

    fresh, _ = build(name, "group", splits)
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
    bodies = "networks torch nn F autograd np copy OrderedDict random_pairs_of_minibatches"  # used by pasted classes
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
