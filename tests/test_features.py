"""What the last linear layer is given, of whatever class; which images; what the scores are of."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from domainbed import feature_scores, features, subsets
from domainbed.algorithms import ALGORITHMS, ERM, get_algorithm_class
from domainbed.algorithms.base import Task, build
from domainbed.datasets import get_dataset_class
from domainbed.features import Features, collect, penultimate
from domainbed.hparams_registry import default_hparams
from domainbed.splits import split_environments, validation_splits

SHAPE, CPU = (3, 28, 28), torch.device("cpu")
X = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
HPARAMS = {"backbone": "small_cnn"}


def hparams(name: str = "ERM", **changed: Any) -> dict[str, Any]:
    return default_hparams(name, "DigitsM2M") | HPARAMS | changed


def erm(**changed: Any) -> Any:
    torch.manual_seed(0)
    return ERM(SHAPE, 4, 2, hparams(**changed))


def given(algorithm: Any, x: Tensor = X) -> Tensor:
    with penultimate(algorithm) as found:
        return found(x)


class Hidden(nn.Module):
    """As somebody's class: one network of its own naming, no featurizer."""

    def __init__(self, body: nn.Module, head: nn.Module):
        super().__init__()
        self.body, self.head = body, head

    def predict(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class NearestMean(nn.Module):
    """As a class whose head is no linear layer."""

    def __init__(self, featurizer: nn.Module):
        super().__init__()
        self.featurizer, self.means = featurizer, nn.Parameter(torch.rand(5, 4))

    def predict(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.featurizer(x), self.means)


class TestPenultimate:
    def test_is_what_the_featurizer_gives_to_a_linear_classifier(self):
        algorithm = erm(nonlinear_classifier=False)
        algorithm.eval()
        with torch.no_grad():
            assert torch.equal(given(algorithm), algorithm.featurizer(X))

    def test_of_several_layers_is_the_input_of_the_last(self):
        algorithm = erm(nonlinear_classifier=True)
        algorithm.eval()
        found = given(algorithm)
        assert found.shape == (4, 12)
        with torch.no_grad():
            assert torch.equal(algorithm.classifier[-1](found), algorithm.predict(X))

    def test_mode_and_hooks_are_as_before(self):
        algorithm = erm()
        algorithm.featurizer.eval()
        given(algorithm)
        assert algorithm.training
        assert not algorithm.featurizer.training
        assert not any(module._forward_hooks for module in algorithm.modules())

    def test_of_a_class_with_other_names(self):
        body = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 7), nn.ReLU())
        assert torch.equal(given(Hidden(body, nn.Linear(7, 4))), body(X))

    def test_of_another_head_is_what_the_featurizer_gives(self):
        featurizer = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 4))
        assert torch.equal(given(NearestMean(featurizer)), featurizer(X))

    def test_without_either_there_are_none(self):
        convolution = nn.Sequential(nn.Conv2d(3, 4, 28), nn.Flatten())
        with pytest.raises(ValueError, match=r"Hidden has no penultimate features.*make its head an nn.Linear"):
            given(Hidden(convolution, nn.Identity()))

    @pytest.mark.parametrize("name", ALGORITHMS)
    def test_every_algorithm_has_some_from_which_its_logits_follow(self, name):
        algorithm = build(get_algorithm_class(name), Task(SHAPE, 4, 2, 4, (9,) * 16, 10), hparams(name))
        algorithm.eval()
        found, logits = given(algorithm), algorithm.predict(X)
        linears = [module for module in algorithm.modules() if isinstance(module, nn.Linear)]
        heads = [linear for linear in linears if linear.in_features == found.shape[1]]
        assert any(torch.equal(head(found), logits) for head in heads)


@pytest.fixture(scope="module")
def data() -> tuple[Any, list[Any], list[Any]]:
    dataset = get_dataset_class("DigitsM2M")(None, [0], {})
    splits = split_environments(dataset, [0], 0.2)
    tested = [split for split in splits if split.kind == "in" and split.env == 0]
    return dataset, tested, validation_splits(dataset, splits, [0])


@pytest.fixture(scope="module")
def found(data: tuple[Any, list[Any], list[Any]]) -> Features:
    dataset, tested, held_out = data
    algorithm = ERM(dataset.input_shape, 4, 2, hparams())
    return collect(algorithm, tested, held_out, dataset.num_confounders, CPU, n=60)


class TestCollect:
    def test_images_are_drawn_evenly_from_the_groups(self, data, found):
        tested = data[1]
        assert found.tested.tolist() == [True] * 60 + [False] * 60
        assert np.unique(found.e, return_counts=True)[1].tolist() == [60, 30, 30]
        groups = found.y[:60] * 4 + found.c[:60]
        counts = np.unique(groups, return_counts=True)[1]
        assert len(counts) == 8
        assert set(counts) <= {7, 8}
        keys = subsets.choose(tested[0], 60, 0, 4).keys
        assert found.y[:60].tolist() == np.asarray(tested[0].environment.y)[keys].tolist()

    def test_features_are_those_of_the_images(self, data):
        dataset, tested, _ = data
        algorithm = ERM(dataset.input_shape, 4, 2, hparams())
        some = collect(algorithm, tested, [], dataset.num_confounders, CPU, n=16, seed=3)
        keys = torch.from_numpy(subsets.choose(tested[0], 16, 3, 4).keys)
        assert some.x == pytest.approx(given(algorithm, tested[0].environment[keys][0]).numpy(), abs=1e-5)
        assert some.tested.all()

    def test_infinite_ones_are_refused(self, data):
        dataset, tested, _ = data
        algorithm = ERM(dataset.input_shape, 4, 2, hparams())
        with torch.no_grad():
            algorithm.featurizer.features[-3].weight.fill_(torch.nan)
        with pytest.raises(ValueError, match=r"ERM's features are not finite \(did it diverge\?\); leave this run out"):
            collect(algorithm, tested, [], 4, CPU, n=16)

    def test_no_images_are_refused(self, data):
        with pytest.raises(ValueError, match="give 1 or more"):
            collect(erm(), data[1], [], 4, CPU, n=0)


class TestScores:
    def test_label_and_confounder_are_of_the_test_images_and_environments_of_all(self, found):
        scores = features.scores(found, found.x, seed=1)
        assert len(scores) == 11
        x, test = found.x, found.tested
        assert scores["silhouette label"] == feature_scores.silhouette(x[test], found.y[test])
        assert scores["purity confounder"] == feature_scores.purity(x[test], found.c[test])
        assert scores["probe environment"] == feature_scores.probe(x, found.e, 1)
        assert scores["proxy A-distance"] == feature_scores.proxy_a_distance(x, test, 1)

    def test_without_confounder_and_held_out_images_there_is_less(self, found):
        test = found.tested
        some = Features(found.x[test], found.y[test], found.c[test] * 0, found.e[test], test[test], False)
        known = {name for name, score in features.scores(some, some.x).items() if score.value is not None}
        assert known == {"silhouette label", "purity label", "probe label"}

    def test_the_label_alone(self, found):
        scores = features.scores(found, features.label_alone(found))
        assert scores["silhouette label"].value > 0.9
        assert scores["purity label"].value == 1
        assert scores["purity confounder"].value > 0.2  # each label has two of the four confounders here


class TestPlane:
    def test_main_directions_are_those_of_scikit_learn(self, found):
        from sklearn.decomposition import PCA

        scaled = (found.x - found.x.mean(axis=0)) / found.x.std(axis=0)
        expected = PCA(2, svd_solver="full").fit_transform(scaled)
        assert np.abs(features.project(found.x)) == pytest.approx(np.abs(expected), abs=1e-3)

    def test_of_a_single_feature_a_second_one_is_zero(self):
        x = np.column_stack([np.arange(9.0), np.ones(9)])
        assert features.project(x)[:, 1] == pytest.approx(np.zeros(9))

    def test_constants_with_rounding_do_not_count(self):
        x = np.random.default_rng(0).normal(size=(2000, 5)).astype(np.float32)
        constants = np.full((2000, 20), 0.1, dtype=np.float32) * np.arange(1, 21, dtype=np.float32)
        constants[::2, :10] = np.nextafter(constants[::2, :10], np.float32(9))
        planes = [features.project(some) for some in (x, np.hstack([x, constants]))]
        assert planes[1] == pytest.approx(planes[0] * np.sign((planes[0] * planes[1]).sum(axis=0)), abs=1e-9)

    def test_small_features_count_as_large_ones(self):
        x = np.random.default_rng(0).normal(size=(50, 4))
        assert np.abs(features.project(x * [1e-8, 1, 1e8, 1])) == pytest.approx(np.abs(features.project(x)))

    def test_umap_is_the_same_for_the_same_seed_and_keeps_what_is_apart_apart(self):
        pytest.importorskip("umap")
        rng = np.random.default_rng(0)
        apart = np.repeat(np.eye(2), 50, axis=0) @ rng.normal(size=(2, 8)) * 5 + rng.normal(size=(100, 8)) * 0.1
        plane = features.embed(apart, seed=1)
        assert plane.shape == (100, 2)
        assert np.array_equal(plane, features.embed(apart, seed=1))
        assert feature_scores.purity(plane, np.repeat([0, 1], 50), "euclidean").value == 1

    def test_umap_needs_images(self):
        with pytest.raises(ValueError, match="UMAP of 3 images: give 5 or more"):
            features.embed(np.eye(3))

    def test_without_umap_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "umap", None)
        with pytest.raises(ImportError, match=r"pip install 'domainbed-ex2l\[report\]'; or --no_umap"):
            features.embed(np.eye(9))
