"""Each backbone trains: one step of ERM at its size, from random weights, with nothing downloaded."""

import math

import pytest
import torch

from domainbed import hparams_registry
from domainbed.algorithms import ERM
from domainbed.backbones import BACKBONES

SIZES = {
    "small_cnn": (3, 36, 36),
    "mnist_cnn": (2, 28, 28),
    "wide_resnet": (3, 32, 32),
    "resnet18": (3, 224, 224),
    "resnet50": (3, 224, 224),
    "efficientnet_lite0": (3, 224, 224),
    "timm:test_vit": (3, 160, 160),
    "torchvision:alexnet": (3, 224, 224),
}


def test_all_are_here():
    """DINOv2, whose code comes from torch.hub, has its step in test_dinov2.py; the identity has nothing to train."""
    assert set(BACKBONES) == {name for name in SIZES if ":" not in name} | {"dinov2", "identity"}


@pytest.mark.parametrize(("name", "shape"), SIZES.items(), ids=SIZES)
def test_one_step_of_erm(name, shape):
    if name in ("efficientnet_lite0", "timm:test_vit"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams("ERM", "PACS") | {"backbone": name, "pretrained": False}
    algorithm = ERM(shape, 3, 2, hparams)
    before = {key: value.clone() for key, value in algorithm.featurizer.named_parameters()}
    minibatches = [(torch.randn(2, *shape), torch.tensor([0, 2])) for _ in range(2)]
    assert math.isfinite(algorithm.update(minibatches)["loss"])
    after = dict(algorithm.featurizer.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    moved = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert len(moved) > len(before) / 2
    logits = algorithm.eval().predict(minibatches[0][0])
    assert logits.shape == (2, 3)
    assert torch.isfinite(logits).all()
