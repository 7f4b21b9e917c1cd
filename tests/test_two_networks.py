"""eX2L's two networks on one trunk, and its heatmaps by other methods and optimizers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed import hparams_registry
from domainbed.algorithms.base import REGISTRY, Task
from domainbed.algorithms_ex2l import EX2L
from domainbed.attribution import METHODS
from domainbed.loaders import Minibatch
from domainbed.similarities import mae

SHAPE, K, V = (3, 36, 36), 3, 2
SHARED = ("classifier", "features.9", "features.6")


def build(**hparams: Any) -> EX2L:
    settings = hparams_registry.default_hparams("EX2L_MAE", "DigitsM2M") | hparams
    torch.manual_seed(0)
    return REGISTRY["EX2L_MAE"].from_task(Task(SHAPE, K, num_domains=2, num_confounders=V), settings)


def step_data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, *SHAPE, generator=generator)
    return x, torch.arange(12) % K, torch.arange(12) % V


def updated(model: EX2L, steps: int = 3) -> dict[str, float]:
    for seed in range(steps):
        x, y, c = step_data(seed)
        values = model.update([Minibatch(x, y, c=c)])
    return values


def ids(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("shared", SHARED)
def test_every_weight_has_one_optimizer_and_the_trunk_is_the_label_networks(shared: str) -> None:
    model = build(shared_from=shared)
    label, confounder = ids(model.optimizer), ids(model.confounder_optimizer)
    assert sorted(label + confounder) == sorted({id(parameter) for parameter in model.parameters()})
    assert {id(p) for p in model.network.parameters()} == set(label)
    assert {id(p) for p in model.confounder_classifier.parameters()} <= set(confounder)
    two = sum(p.numel() for p in build().parameters())
    assert sum(p.numel() for p in model.parameters()) < two


@pytest.mark.parametrize("shared", SHARED)
def test_what_is_shared_runs_once_in_a_step(shared: str) -> None:
    model, runs = build(shared_from=shared), []
    for name in ("features.0", "features.12"):
        layer = model.featurizer.get_submodule(name)
        layer.register_forward_hook(lambda *seen, name=name: runs.append(name))
    updated(model, steps=1)
    assert sorted(runs) == ["features.0", "features.12"]


@pytest.mark.parametrize("shared", SHARED)
def test_gradients_of_a_shared_trunk_are_the_sum_of_both_losses(shared: str) -> None:
    """One step of plain SGD against autograd on a loss that is written out, each part with a forward of its own."""
    model = build(shared_from=shared, optimizer="sgd", momentum=0.0, lr_l=1.0, lr_c=1.0, lambda_1=0.7, lambda_2=0.4)
    x, y, c = step_data()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    (_, label_maps), _ = model.explain(x, y, c)
    _, (_, confounder_maps) = model.explain(x, y, c)
    live = (label_maps.amax((1, 2)) > 0) & (confounder_maps.amax((1, 2)) > 0)
    loss = F.cross_entropy(model.predict(x), y) + 0.7 * F.cross_entropy(model.predict_confounder(x), c)
    loss = loss + 0.4 * mae(label_maps, confounder_maps)[live].mean()
    expected = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))

    model.update([Minibatch(x, y, c=c)])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shared", ["", *SHARED])
def test_confounder_predictions_are_those_that_training_explains(shared: str) -> None:
    model = build(shared_from=shared)
    updated(model)
    x, y, c = step_data(7)
    _, (logits, _) = model.explain(x, y, c)
    torch.testing.assert_close(model.predict_confounder(x), logits)
    assert model.predict_confounder(x).shape == (12, V)
    assert model.predict(x).shape == (12, K)


@pytest.mark.parametrize("shared", SHARED)
def test_the_penalty_matters_on_a_shared_trunk_and_the_control_switches_it_off(shared: str) -> None:
    method, control, unpenalised = (build(shared_from=shared, **more) for more in ({}, EX2L.CONTROL, {"lambda_2": 0.0}))
    for model in (method, control, unpenalised):
        updated(model)
    x, _, _ = step_data(9)
    torch.testing.assert_close(control.predict(x), unpenalised.predict(x), rtol=0, atol=0)
    assert not torch.allclose(method.predict(x), control.predict(x))


def test_a_layer_that_cannot_be_split_is_explained() -> None:
    with pytest.raises(ValueError, match="has no layer 'layer4'"):
        build(shared_from="layer4")
    with pytest.raises(ValueError, match='by the value "classifier"'):
        build(shared_from="features.14")


@pytest.mark.parametrize("method", list(METHODS))
def test_heatmaps_by_each_method_equal_its_function_on_the_captured_maps(method: str) -> None:
    model = build(map_method=method)
    x, y, c = step_data()
    (_, heatmaps), _ = model.explain(x, y, c)
    seen: list[Tensor] = []
    handle = model.featurizer.map_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    score = model.predict(x).gather(1, y[:, None])[:, 0]
    handle.remove()
    torch.testing.assert_close(heatmaps, METHODS[method](seen[0], score), rtol=1e-4, atol=1e-7)
    assert model.linear_head
    assert all(value == value for value in updated(model).values())


def test_weights_are_read_off_only_where_they_are_the_gradient() -> None:
    assert not build(map_layer="features.8").linear_head
    assert not build(nonlinear_classifier=True).linear_head
    hooks: list[nn.Module] = []
    model = build()
    model.classifier.register_full_backward_hook(lambda module, *gradients: hooks.append(module))
    updated(model, steps=1)
    assert len(hooks) == 1  # the update's own backward pass, and none for the heatmaps


def test_both_optimizers_are_those_that_are_asked_for() -> None:
    model = build(optimizer="sgd", momentum=0.5)
    for optimizer in (model.optimizer, model.confounder_optimizer):
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.param_groups[0]["momentum"] == 0.5
    assert isinstance(build().confounder_optimizer, torch.optim.Adam)
    with pytest.raises(ValueError, match="map_method 'score_cam' is unknown; take one of grad_cam"):
        build(map_method="score_cam")


def test_readings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"map_layer of SmallCNN not found: features\.99"):
        build(map_layer="features.99")
    for row, normalisation in (("EX2L_SoftIoU", "none"), ("EX2L_JSDistance", "max"), ("EX2L_SSIM", "l1")):
        settings = hparams_registry.default_hparams(row, "DigitsM2M") | {"map_normalisation": normalisation}
        with pytest.raises(
            ValueError, match=rf"map_normalisation {normalisation}: {REGISTRY[row].SIMILARITY} .*take own"
        ):
            REGISTRY[row].from_task(Task(SHAPE, K, num_domains=2, num_confounders=V), settings)
    with pytest.raises(ValueError, match=r"activation of SmallCNN: .*a heatmap needs a layer"):
        build(map_layer="activation")
    with pytest.raises(ValueError, match="lambda_2_ramp -5: must not be negative"):
        build(lambda_2_ramp=-5)
