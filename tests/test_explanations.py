"""Metrics of explanations: image by image, over a split, of any class that can be explained."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from domainbed import (
    attribution,
    evaluation,
    explanation_metrics,
    feature_maps,
    hparams_registry,
    masking,
    similarities,
)
from domainbed.algorithms.base import REGISTRY, Task
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.evaluation import ExplanationPlan, Explanations, mean_colour, split_explanations
from domainbed.explainers import Explainer
from domainbed.feature_maps import evaluating
from domainbed.lib.misc import predicted_labels
from domainbed.splits import Split
from domainbed.subsets import Subset, choose

CPU = torch.device("cpu")
FILLS = ("blur", "mean", "zero")
K, V, N, SIDE = 3, 2, 40, 12


class Features(nn.Sequential):
    """Two convolutions and their average; the second one's maps are explained."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    @property
    def map_layer(self) -> nn.Module:
        return self[4]


class Foreign(nn.Module):
    """A class of somebody else's: a featurizer with a map_layer, a classifier, predict, nothing of ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.featurizer = Features()
        self.classifier = nn.Linear(5, K)
        nn.init.normal_(self.classifier.weight, std=30)
        self.classifier.bias.data[:] = 0  # so that the predicted logit is positive, and its heatmap live

    def predict(self, x: Tensor) -> Tensor:
        return self.classifier(self.featurizer(x))


def split(masks: bool = True) -> Split:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(N, 3, 1, 1)) * rng.random((N, 3, SIDE, SIDE))).float()
    known = torch.zeros(N, SIDE, SIDE, dtype=torch.uint8)
    known[:, 3:9, 2:7] = 255
    y, c = torch.from_numpy(rng.integers(0, K, N)), torch.from_numpy(rng.integers(0, V, N))
    environment = InMemoryEnvironment(x, y, c, masks=known if masks else None)
    return Split(2, "in", environment, np.arange(3, N), 2)


def explained(algorithm: Any, some: Split | None = None, confounders: int = V, **plan: Any) -> Explanations:
    return split_explanations(algorithm, some or split(), confounders, CPU, ExplanationPlan(**{"images": 20, **plan}))


@pytest.mark.parametrize("fill", FILLS)
def test_each_image_has_the_value_that_it_has_alone(fill: str) -> None:
    algorithm, some = Foreign(), split()
    found = explained(algorithm, some, fills=(fill,))
    keys = choose(some, 20, 0, V).keys
    assert (found.subset.keys == keys).all()
    assert (found.y == some.environment.y[keys]).all()
    assert (found.c == some.environment.c[keys]).all()
    algorithm.eval()
    x, network = some.environment[torch.from_numpy(keys)][0], nn.Sequential(algorithm.featurizer, algorithm.classifier)
    colour = (torch.from_numpy(found.subset.weights)[:, None, None, None] * x.double()).sum(0).mean((1, 2)).float()
    for i in range(len(keys)):
        one = x[i : i + 1]
        logits, heatmap = attribution.explain(network, algorithm.featurizer[4], one, None, policy="none")
        predicted = predicted_labels(logits)
        filled = masking.fill(one, fill, colour)
        expected = explanation_metrics.faithfulness(network, one, heatmap, predicted, filled)
        expected = {explanation_metrics.name(name, fill): value for name, value in expected.items()}
        there = torch.from_numpy(some.environment.masks[keys[i : i + 1]] / 255).float()
        for name, value in explanation_metrics.localisation(heatmap, there).items():
            expected[explanation_metrics.name(name)] = value
        expected["dead_maps_lower"] = (heatmap.amax() == 0).float()
        assert found.predicted[i] == predicted.item()
        assert expected.keys() == found.values.keys()
        for name, value in expected.items():
            assert found.values[name][i] == pytest.approx(value.item(), abs=1e-5), name
    assert found.means()["dead_maps_lower"] < 0.5


def test_batches_change_nothing() -> None:
    whole, parts = (explained(Foreign(), fills=FILLS, batch_size=size) for size in (64, 3))
    assert (whole.subset.keys == parts.subset.keys).all()
    assert (whole.predicted == parts.predicted).all()
    for name, values in whole.values.items():
        assert values == pytest.approx(parts.values[name], abs=1e-5), name


def test_each_fill_has_numbers_of_its_own() -> None:
    together = explained(Foreign(), fills=FILLS)
    for fill in FILLS:
        alone = explained(Foreign(), fills=(fill,)).values
        own = [name for name in alone if f"_{fill}_" in name]
        assert len(own) == 6
        for name in own:
            np.testing.assert_allclose(together.values[name], alone[name], atol=1e-6)
    blur, zero = (together.values[f"deletion_auc_{fill}_lower"] for fill in ("blur", "zero"))
    assert abs(blur - zero).max() > 1e-3


def test_images_do_not_depend_on_the_algorithm() -> None:
    one, other = Foreign(), Foreign()
    other.classifier.weight.data *= -1
    first, second = explained(one), explained(other)
    assert (first.predicted != second.predicted).any()
    assert (first.subset.keys == second.subset.keys).all()


def test_the_algorithm_stays_as_it_was() -> None:
    algorithm = Foreign()
    algorithm.featurizer[1].eval()
    modes = {name: module.training for name, module in algorithm.named_modules()}
    state = {name: value.clone() for name, value in algorithm.state_dict().items()}
    explained(algorithm)
    assert {name: module.training for name, module in algorithm.named_modules()} == modes
    assert all(torch.equal(value, algorithm.state_dict()[name]) for name, value in state.items())
    assert all(p.grad is None and p.requires_grad for p in algorithm.parameters())


def test_frozen_weights_make_no_difference() -> None:
    frozen = Foreign().requires_grad_(False)
    assert explained(frozen).means() == pytest.approx(explained(Foreign()).means(), abs=1e-6)


@pytest.mark.parametrize("method", [*attribution.METHODS, *attribution.EVALUATION_METHODS])
def test_every_attribution_method(method: str) -> None:
    found = explained(Foreign(), method=method, images=6)
    assert all(np.isfinite(values).all() for values in found.values.values())


def test_means_by_hand() -> None:
    subset = Subset(np.arange(4), np.array([0, 0, 3, 3]), True, {0: 6, 3: 2})
    values = {"a_lower": np.array([1.0, 3.0, 5.0, np.nan]), "b_higher": np.array([np.nan, np.nan, np.nan, 2.0])}
    nothing = np.zeros(4, dtype=np.int64)
    found = Explanations(subset, nothing, nothing, nothing, values | {"c_lower": np.full(4, np.nan)})
    # 3/8 for each of the first two, 1/8 for each of the others
    assert found.means() == pytest.approx({"a_lower": (3 * 1 + 3 * 3 + 5) / 7, "b_higher": 2.0})
    assert found.group_means() == {0: {"a_lower": 2.0}, 3: {"a_lower": 5.0, "b_higher": 2.0}}


def test_means_over_a_whole_split_are_plain() -> None:
    found = explained(Foreign(), images=1000)
    assert len(found.subset.keys) == len(split())
    assert found.means() == pytest.approx({name: values.mean() for name, values in found.values.items()})


def test_mean_colour() -> None:
    x = torch.rand(5, 3, 4, 4)
    weights = np.array([0.1, 0.2, 0.3, 0.2, 0.2])
    expected = sum(w * image.mean((1, 2)) for w, image in zip(weights.tolist(), x, strict=True))
    for size in (1, 2, 5):
        assert mean_colour(x.split(size), weights) == pytest.approx(expected, abs=1e-6)


def test_a_dead_map_is_counted() -> None:
    algorithm = Foreign()
    algorithm.featurizer[3].bias.data[:] = -1000  # nothing gets through the ReLU
    found = explained(algorithm).means()
    assert found["dead_maps_lower"] == pytest.approx(1)
    assert found["energy_in_mask_higher"] == 0


def test_without_masks_and_without_confounders() -> None:
    found = explained(Foreign(), split(masks=False), confounders=1)
    assert len(found.values) == 7
    assert not {"mask_iou_higher", "map_overlap_lower", "learned_mask_iou_higher"} & found.values.keys()
    assert not found.subset.grouped


class Masked(Foreign):
    """Learned the true masks, but half of their height."""

    def mask(self, x: Tensor) -> Tensor:
        assert not self.training
        found = torch.zeros(len(x), SIDE, SIDE)
        found[:, 3:6, 2:7] = 0.8
        return found


def test_a_learned_mask() -> None:
    found = explained(Masked()).means()
    assert found["learned_mask_iou_higher"] == pytest.approx(0.5)
    assert found["learned_mask_area"] == pytest.approx(0.8 * 15 / SIDE**2)
    alone = explained(Masked(), split(masks=False)).values
    assert "learned_mask_area" in alone
    assert "learned_mask_iou_higher" not in alone


def test_an_image_whose_true_mask_is_empty_counts_as_not_annotated() -> None:
    some = split()
    emptied = some.keys[::2]
    some.environment.masks = some.environment.masks.copy()
    some.environment.masks[emptied] = 0
    found, whole = explained(Masked(), some), explained(Masked()).values
    empty = np.isin(found.subset.keys, emptied)
    assert 0 < empty.sum() < len(empty)
    for name in ("energy_in_mask_higher", "mask_iou_higher", "pointing_game_higher", "learned_mask_iou_higher"):
        assert np.isnan(found.values[name][empty]).all()
        np.testing.assert_array_equal(found.values[name][~empty], whole[name][~empty])
    assert not np.isnan(found.values["learned_mask_area"]).any()


class Homonyms(Foreign):
    """Has methods that mean something else."""

    def explain(self, foo: str) -> str:
        return foo

    def mask(self) -> None:
        pass


def test_methods_that_only_share_a_name_are_not_asked() -> None:
    expected = explained(Foreign()).values
    found = explained(Homonyms()).values
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("shared", ["", "classifier"])
def test_the_overlap_of_two_networks(shared: str) -> None:
    """Against the mean that training watches, whose images with a dead map are left out, too."""
    hparams = hparams_registry.default_hparams("EX2L_MAE", "DigitsM2M") | {"shared_from": shared}
    torch.manual_seed(0)
    algorithm = REGISTRY["EX2L_MAE"].from_task(Task((3, 36, 36), K, num_domains=2, num_confounders=V), hparams)
    algorithm.confounder_classifier.weight.data[1] = 0  # nothing speaks for c = 1
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(N, 3, 36, 36, generator=generator), torch.arange(N) % K
    c = torch.arange(N) // 7 % V
    some = Split(0, "in", InMemoryEnvironment(x, y, c), np.arange(N), 0)
    found = explained(algorithm, some, images=N, batch_size=16)
    with evaluating(algorithm):
        (_, label_maps), (_, confounder_maps) = algorithm.explain(x, y, c)
    expected = similarities.describe(label_maps, confounder_maps)
    overlap = found.values["map_overlap_lower"]
    assert np.isnan(overlap).mean() == pytest.approx(expected["dead_maps"])
    assert 0 < np.isnan(overlap).mean() < 1
    assert np.nanmean(overlap) == pytest.approx(expected["map_overlap"], abs=1e-5)


class Named(Foreign):
    """Names another layer in its hparams."""

    def __init__(self, layer: str):
        super().__init__()
        self.hparams = {"map_layer": layer}


def test_the_hparam_names_the_layer() -> None:
    algorithm = Named("2")
    x = torch.zeros(2, 3, SIDE, SIDE)
    assert Explainer(algorithm).layer(x) is algorithm.featurizer[2]
    assert Explainer(unnamed := Named("")).layer(x) is unnamed.featurizer[4]
    assert explained(algorithm).means() != explained(Foreign()).means()


class Bare(nn.Module):
    """No featurizer."""

    def predict(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :K]


class Elsewhere(Foreign):
    """Predicts without its featurizer."""

    def predict(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :K]


class Copied(Foreign):
    """Predicts by a copy of its network, of which it doesn't say which one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(nn.Sequential(self.featurizer, self.classifier))
        self.average[1].weight.data *= -1

    def predict(self, x: Tensor) -> Tensor:
        return self.average(x)


class Both(Copied):
    """Predicts by two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = self.featurizer
        del self.featurizer

    def predict(self, x: Tensor) -> Tensor:
        return self.average(x) + self.classifier(self.body(x))


class Whole(nn.Sequential):
    """Names other maps than the featurizer that it has inside."""

    @property
    def map_layer(self) -> nn.Module:
        return self[0][2]


class Wrapped(Copied):
    def __init__(self) -> None:
        super().__init__()
        self.average = Whole(*self.average)


class Relative(Foreign):
    """Predicts an image by its difference from the mean of the images that it comes with."""

    def predict(self, x: Tensor) -> Tensor:
        features = self.featurizer(x)
        return self.classifier(features - 0.5 * features.mean(0))


def test_the_network_that_predict_runs_is_explained() -> None:
    algorithm, x = Copied(), torch.zeros(2, 3, SIDE, SIDE)
    assert Explainer(algorithm).layer(x) is algorithm.average[0][4]
    wrapped = Wrapped()
    assert Explainer(wrapped).layer(x) is wrapped.average[0][2]
    both = Both()
    both.add_module("featurizer", both.body)
    assert Explainer(both).layer(x) is both.body[4]


@pytest.mark.parametrize("method", list(attribution.METHODS))
@pytest.mark.parametrize("n", [1, 2, 5])
def test_an_image_is_explained_by_its_own_logit_where_a_batch_is_predicted_together(method: str, n: int) -> None:
    algorithm, (x, _) = Relative().eval(), split().environment[torch.arange(n)]
    logits, heatmaps = Explainer(algorithm, method).heatmaps(x)
    for i, k in enumerate(logits.argmax(1)):
        with feature_maps.capture(algorithm.featurizer[4]) as seen:
            own = algorithm.predict(x)[i, k]
        maps = seen.maps
        gradient = torch.autograd.grad(own, maps)[0]
        expected = attribution.METHODS[method](maps[i : i + 1], own[None], policy="none", gradient=gradient[i : i + 1])
        torch.testing.assert_close(heatmaps[i], expected[0])
    assert heatmaps.any()


class OnePixel(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.hparams = {"map_layer": "5"}


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (Bare(), "Bare can't be explained: heatmaps need an attribute `featurizer` with `map_layer`"),
        (Named("7"), "Named can't be explained"),
        (Elsewhere(), "Elsewhere.predict does not run the map_layer of its featurizer"),
        (Both(), "Both can't be explained: its predict runs several networks that have maps, average.0, body; name "),
        (OnePixel(), "OnePixel can't be explained: .* a map of one pixel explains nothing"),
    ],
)
def test_what_can_not_be_explained(algorithm: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Explainer(algorithm).check((3, SIDE, SIDE))


def test_check_passes_what_can_be_explained() -> None:
    algorithm = Foreign()
    Explainer(algorithm).check((3, SIDE, SIDE))
    assert algorithm.training


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"method": "grad_kam"}, NotImplementedError, "attribution method not found: grad_kam; did you mean grad_cam"),
        ({"fills": ["noise"]}, ValueError, "unknown fill of masked pixels: 'noise'"),
        ({"images": 0}, ValueError, "0 images to explain"),
    ],
)
def test_plans_that_mean_nothing(plan: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explained(Foreign(), **plan)


def test_the_names_of_metrics_say_fill_and_direction() -> None:
    def directed(names: Sequence[str]) -> bool:
        return all(name.endswith(("_lower", "_higher")) for name in names)

    names = explained(Foreign(), fills=FILLS, images=6).values.keys()
    assert directed(names)
    assert {f"sufficiency_{fill}_lower" for fill in FILLS} <= names


def test_what_speaks_against_a_class_is_no_overlap() -> None:
    maps = torch.tensor([[[1.0, -1.0], [0.5, 0.0]]])
    other = torch.tensor([[[0.5, -1.0], [0.0, 1.0]]])
    (signed,) = evaluation._overlap((maps, other)).values()
    (positive,) = evaluation._overlap((maps.relu(), other.relu())).values()
    assert signed.item() == positive.item() == pytest.approx(0.5 / (1.5 + 1.5 - 0.5))
