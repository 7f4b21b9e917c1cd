"""DRE against its loss written out image by image, and its control against empirical risk minimisation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed import hparams_registry
from domainbed.algorithms.base import REGISTRY, Task
from domainbed.algorithms.dre import DRE, partners

SHAPE, K = (3, 36, 36), 3
OFF = {"dre_consistency": 0.0, "dre_sparsity": 0.0, "dre_mixed": 0.0}


def build(name: str = "DRE", **hparams: Any) -> Any:
    settings = hparams_registry.default_hparams(name, "DigitsM2M") | hparams
    torch.manual_seed(0)
    return REGISTRY[name].from_task(Task(SHAPE, K, num_domains=2), settings)


def step_data(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor([0, 1, 2, 0, 1, 0, 1])
    x = torch.randn(7, *SHAPE, generator=generator) + y.view(-1, 1, 1, 1)
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def slow_map(model: DRE, x: Tensor, target: int) -> Tensor:
    """Signed Grad-CAM of one image (C, H, W), from its minimum at 0 to its maximum at 1."""
    maps = model.featurizer.features(x[None])  # (1, C, h, w)
    score = model.classifier(maps.mean((2, 3)))[0, target]
    (gradient,) = torch.autograd.grad(score, maps, retain_graph=True)
    found = sum(gradient[0, k].mean().detach() * maps[0, k] for k in range(maps.shape[1]))
    return (found - found.min()) / (found.max() - found.min())


def slow_loss(model: DRE, x: Tensor, y: Tensor, other: Tensor, share: Tensor) -> Tensor:
    h = model.hparams
    loss = torch.zeros((), dtype=torch.float64)
    for i, target in enumerate(y.tolist()):
        j, s = int(other[i]), share[i]
        mixed = s * x[i] + (1 - s) * x[j]
        own, others = slow_map(model, x[i], target), slow_map(model, x[j], target)
        together = slow_map(model, mixed, target)
        loss = loss + F.cross_entropy(model.predict(x[i : i + 1]), y[i : i + 1]) / len(y)
        loss = loss + h["dre_consistency"] * (together - s * own - (1 - s) * others).abs().mean() / len(y)
        loss = loss + h["dre_sparsity"] * own.mean() / len(y)
        loss = loss + h["dre_mixed"] * F.cross_entropy(model.predict(mixed[None]), y[i : i + 1]) / len(y)
    return loss


def test_the_loss_and_its_gradients_are_those_written_out() -> None:
    model = build(dre_consistency=0.7, dre_sparsity=0.3, dre_mixed=0.2, optimizer="sgd", momentum=0.0, lr=1.0).double()
    data = [(x.double(), y) for x, y in step_data()]
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    torch.manual_seed(5)
    other, share = partners(y), torch.distributions.Beta(0.2, 0.2).sample((7,)).double()
    loss = slow_loss(model, x, y, other, share)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    before = [weight.detach().clone() for weight in model.parameters()]
    torch.manual_seed(5)
    values = model.update(data)
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-6)
    terms = 0.7 * values["consistency"] + 0.3 * values["sparsity"] + 0.2 * values["mixed_risk"]
    assert values["loss"] == pytest.approx(values["risk"] + terms, rel=1e-6)
    assert min(values.values()) > 0
    for weight, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(old - weight, gradient, rtol=1e-4, atol=1e-6)  # maps are normalised in float32


def test_partners_are_a_permutation_within_the_classes() -> None:
    y = torch.tensor([2, 0, 1, 0, 2, 2, 0, 3])
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        other = partners(y)
        assert sorted(other.tolist()) == list(range(8))
        assert torch.equal(y[other], y)
        seen.add(tuple(other.tolist()))
    assert len(seen) > 15  # of 36
    assert {found[7] for found in seen} == {7}  # alone in its class


def test_without_weights_it_is_erm() -> None:
    dre, erm = build(**OFF), build("ERM")
    for seed in range(3):
        torch.manual_seed(seed)
        values = dre.update(step_data(seed))
        torch.manual_seed(seed)
        expected = erm.update(step_data(seed))
        assert values == {"loss": expected["loss"], "risk": expected["loss"]}
    for a, b in zip(dre.state_dict().values(), erm.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_constant_image_stays_finite() -> None:
    model = build()
    for _ in range(2):
        values = model.update([(torch.zeros(4, *SHAPE), torch.tensor([0, 0, 1, 2]))])
        assert all(torch.isfinite(torch.tensor(list(values.values()))))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_it_trains_under_autocast() -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        values = model.update(step_data())
    assert all(torch.isfinite(torch.tensor(list(values.values()))))


@pytest.mark.parametrize("wrong", [{"map_gradient": "none"}, {"map_method": "score_cam"}, {"map_normalisation": "x"}])
def test_readings_that_do_not_exist_are_named(wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} '{value}' is unknown; take one of"):
        build(**wrong)


def test_a_network_without_maps_is_refused() -> None:
    hparams = hparams_registry.default_hparams("DRE", "DigitsM2M") | {"mlp_width": 4, "mlp_depth": 3, "mlp_dropout": 0}
    with pytest.raises(ValueError, match="MLP has no feature maps"):
        DRE((5,), K, 1, {k: v for k, v in hparams.items() if k != "backbone"})
