"""The backbone of vectors that are features already."""

import pytest
import torch

from domainbed import algorithms, hparams_registry, networks
from domainbed.algorithms.base import Task
from domainbed.explainers import Explainer

HPARAMS = {"backbone": "identity"}


def test_features_are_the_input() -> None:
    featurizer = networks.Featurizer((5,), HPARAMS)
    x = torch.randn(3, 5)
    assert featurizer.n_outputs == 5
    assert torch.equal(featurizer(x), x)
    assert not list(featurizer.parameters())
    featurizer.activation = torch.nn.ReLU()
    assert torch.equal(featurizer(x), x.relu())


def test_vectors_without_a_backbone_still_get_an_mlp() -> None:
    network = networks.Featurizer((5,), {"backbone": "", "mlp_width": 4, "mlp_depth": 2, "mlp_dropout": 0.0})
    assert isinstance(network, networks.MLP)


def test_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone identity takes vectors \(D,\), not shape \(3, 28, 28\); name anot"):
        networks.Featurizer((3, 28, 28), HPARAMS)


def test_other_backbones_still_refuse_vectors() -> None:
    with pytest.raises(ValueError, match=r"backbone small_cnn takes images \(C, H, W\), not shape \(5,\)"):
        networks.Featurizer((5,), {"backbone": "small_cnn"})


def build(name: str) -> algorithms.Algorithm:
    hparams = hparams_registry.default_hparams(name, "Debug28") | HPARAMS
    found: algorithms.Algorithm = algorithms.get_algorithm_class(name).from_task(Task((5,), 3, 2, 2), hparams)
    return found


@pytest.mark.parametrize("name", ["EX2L_MAE", "ALIGN", "RRR_Confounder", "GRADIA", "DRE"])
def test_methods_that_look_at_maps_say_that_there_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="GivenFeatures has no feature maps"):
        build(name)


def test_heatmaps_are_refused() -> None:
    with pytest.raises(ValueError, match="ERM can't be explained"):
        Explainer(build("ERM"))
