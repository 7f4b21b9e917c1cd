"""eX2L against a slow re-implementation, its control, and plain empirical risk minimisation."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial import distance
from skimage.metrics import structural_similarity
from torch import Tensor

from domainbed import hparams_registry
from domainbed.algorithms.base import REGISTRY, Task
from domainbed.algorithms_ex2l import EX2L
from domainbed.loaders import Minibatch

ROWS = ("EX2L_MAE", "EX2L_Cosine", "EX2L_SoftDice", "EX2L_JSDistance", "EX2L_SSIM")
KEYS = {"loss", "label_loss", "confounder_loss", "similarity", "dead_maps", "confounder_acc"}
K, V = 2, 3


def build(row: str = "EX2L_MAE", shape: tuple[int, int, int] = (3, 36, 36), **hparams: Any) -> EX2L:
    settings = hparams_registry.default_hparams(row, "Debug28") | {"backbone": "small_cnn"} | hparams
    torch.manual_seed(0)
    return REGISTRY[row].from_task(Task(shape, K, num_domains=K * V, num_confounders=V), settings)


def step_data(seed: int, shape: tuple[int, int, int] = (3, 36, 36), rows: int = 2) -> list[Minibatch]:
    """One minibatch per group; every group has a mean colour of its own, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    minibatches = []
    for g in range(K * V):
        y, c = torch.full((rows,), g // V), torch.full((rows,), g % V)
        x = torch.randn(rows, *shape, generator=generator)
        x[:, :, : shape[1] // 2] += (y - 0.5).view(-1, 1, 1, 1)
        x[:, :, shape[1] // 2 :] += (c - 1.0).view(-1, 1, 1, 1)
        minibatches.append(Minibatch(x, y, c=c))
    return minibatches


def joined(minibatches: list[Minibatch]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.cat([x for x, _ in minibatches]),
        torch.cat([y for _, y in minibatches]),
        torch.cat([m.c for m in minibatches]),
    )


def assert_equal_weights(one: torch.nn.Module, other: torch.nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **tolerance or {"rtol": 0, "atol": 0})


def pooled_grad_cam(featurizer: torch.nn.Module, classifier: torch.nn.Linear, x: Tensor, target: int) -> np.ndarray:
    """Class activation map of one image (3, H, W): with pooling and one linear layer, weights are w / Z."""
    seen: list[Tensor] = []
    handle = featurizer.map_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    featurizer(x[None])
    handle.remove()
    maps, weights = seen[0][0].detach().double().numpy(), classifier.weight[target].detach().double().numpy()
    pixels = maps.shape[1] * maps.shape[2]
    return np.maximum(sum(w * channel for w, channel in zip(weights, maps, strict=True)) / pixels, 0)


def on_unit_scale(score: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda a, b: score(a / a.max(), b / b.max())


REFERENCES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "EX2L_MAE": on_unit_scale(lambda a, b: -np.abs(a - b).mean()),
    "EX2L_Cosine": lambda a, b: 1 - distance.cosine(a.ravel(), b.ravel()),
    "EX2L_SoftDice": on_unit_scale(lambda a, b: 2 * (a * b).sum() / (a + b).sum()),
    "EX2L_JSDistance": lambda a, b: -distance.jensenshannon(a.ravel(), b.ravel()),
    "EX2L_SSIM": on_unit_scale(
        lambda a, b: structural_similarity(a, b, win_size=len(a), data_range=1.0, use_sample_covariance=True)
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_values_equal_a_slow_reimplementation(row: str) -> None:
    model = build(row, lambda_1=0.7, lambda_2=2.0)
    minibatches = step_data(1)
    x, y, c = joined(minibatches)
    before = copy.deepcopy(model)
    values = model.update(minibatches)

    scores = []
    for image, label, confounder in zip(x, y.tolist(), c.tolist(), strict=True):
        label_map = pooled_grad_cam(before.featurizer, before.classifier, image, label)
        confounder_map = pooled_grad_cam(before.confounder_featurizer, before.confounder_classifier, image, confounder)
        if label_map.max() > 0 and confounder_map.max() > 0:
            scores.append(REFERENCES[row](label_map, confounder_map))
    label_loss = -before.predict(x).log_softmax(1)[range(len(x)), y].mean().item()
    confounder_logits = before.predict_confounder(x)
    confounder_loss = -confounder_logits.log_softmax(1)[range(len(x)), c].mean().item()
    assert scores
    assert values == pytest.approx(
        {
            "loss": label_loss + 0.7 * confounder_loss + 2.0 * np.mean(scores),
            "label_loss": label_loss,
            "confounder_loss": confounder_loss,
            "similarity": np.mean(scores),
            "dead_maps": 1 - len(scores) / len(x),
            "confounder_acc": np.mean(confounder_logits.argmax(1).numpy() == c.numpy()),
        },
        rel=1e-4,
        abs=1e-5,
    )


@pytest.mark.parametrize(("row", "size"), [*((row, 36) for row in ROWS), ("EX2L_MAE", 28)])
def test_three_updates_are_finite(row: str, size: int) -> None:
    shape = (3, size, size)
    model = build(row, shape, backbone="small_cnn" if size == 36 else None)  # None: MNIST_CNN, by its size
    for seed in range(3):
        values = model.update(step_data(seed, shape))
        assert values.keys() == KEYS
        assert all(map(math.isfinite, values.values()))
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


@pytest.mark.parametrize("policy", ["constant", "full", "none"])
def test_bf16_autocast_is_finite(policy: str) -> None:
    model = build(map_gradient=policy)
    for seed in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = model.update(step_data(seed))
        assert all(map(math.isfinite, values.values()))
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def trained(updates: int = 3, **hparams: Any) -> EX2L:
    model = build(**hparams)
    for seed in range(updates):
        model.update(step_data(seed))
    return model


def test_no_weight_and_no_gradient_are_the_same_control() -> None:
    assert_equal_weights(trained(lambda_2=0.0), trained(map_gradient="none"))


@pytest.mark.parametrize("policy", ["constant", "full"])
def test_penalty_changes_both_networks(policy: str) -> None:
    control, model = trained(1, map_gradient="none"), trained(1, map_gradient=policy)
    for network in ("featurizer", "confounder_featurizer"):
        pairs = zip(getattr(control, network).parameters(), getattr(model, network).parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)
    for head in ("classifier", "confounder_classifier"):
        same = torch.equal(getattr(control, head).weight, getattr(model, head).weight)
        assert same == (policy == "constant")  # the first step's gradient of a head: none, unless weights are live


@pytest.mark.parametrize(("network", "lr"), [("network", 2e-3), ("confounder_network", 5e-4)])
def test_control_trains_each_network_like_erm(network: str, lr: float) -> None:
    settings = {"map_gradient": "none", "lr_l": 2e-3, "lr_c": 5e-4, "wd_l": 0.01, "wd_c": 0.01}
    alone = getattr(build(**settings), network)
    optimizer = torch.optim.Adam(alone.parameters(), lr=lr, weight_decay=0.01)
    for seed in range(3):
        x, y, c = joined(step_data(seed))
        optimizer.zero_grad()
        F.cross_entropy(alone(x), y if network == "network" else c).backward()
        optimizer.step()
    assert_equal_weights(getattr(trained(**settings), network), alone)


def test_label_network_starts_like_erm() -> None:
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams("ERM", "Debug28") | {"backbone": "small_cnn"}
    erm = REGISTRY["ERM"]((3, 36, 36), K, K * V, hparams)
    assert_equal_weights(build().network, erm.network)


def test_penalty_moves_the_maps_apart() -> None:
    minibatches = step_data(0)

    def final_similarity(policy: str) -> float:
        model = build("EX2L_Cosine", lambda_2=1.0, map_gradient=policy)
        return [model.update(minibatches)["similarity"] for _ in range(15)][-1]

    assert final_similarity("constant") < final_similarity("none") - 0.1


def test_dead_maps_are_left_out_of_the_mean() -> None:
    model = build()
    label_maps, confounder_maps = torch.rand(4, 3, 3), torch.rand(4, 3, 3)
    label_maps[0], confounder_maps[2] = 0, 0
    similarity, dead = model.mean_similarity(label_maps.requires_grad_(), confounder_maps)
    both_live = [1, 3]
    torch.testing.assert_close(similarity, model.similarity(label_maps[both_live], confounder_maps[both_live]).mean())
    assert dead.item() == 0.5
    (gradient,) = torch.autograd.grad(similarity, label_maps)
    assert gradient[[0, 2]].abs().max() == 0
    assert gradient[both_live].abs().min(dim=0).values.sum() > 0


@pytest.mark.parametrize("row", ROWS)
def test_all_maps_dead(row: str) -> None:
    model = build(row)
    torch.nn.init.zeros_(model.classifier.weight)
    values = model.update(step_data(0))
    assert values["similarity"] == 0
    assert values["dead_maps"] == 1
    assert values["loss"] == pytest.approx(values["label_loss"] + values["confounder_loss"])
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def test_state_dict_round_trip() -> None:
    model, fresh = trained(1), build()
    fresh.load_state_dict(model.state_dict())
    x, _, _ = joined(step_data(9))
    torch.testing.assert_close(fresh.predict(x), model.predict(x), rtol=0, atol=0)
    torch.testing.assert_close(fresh.predict_confounder(x), model.predict_confounder(x), rtol=0, atol=0)


def test_predictions_come_from_their_own_networks() -> None:
    model = build()
    x, _, _ = joined(step_data(0))
    labels, confounders = model.predict(x), model.predict_confounder(x)
    assert labels.shape == (len(x), K)
    assert confounders.shape == (len(x), V)
    with torch.no_grad():
        for weight in model.confounder_network.parameters():
            weight.zero_()
    torch.testing.assert_close(model.predict(x), labels, rtol=0, atol=0)
    assert model.predict_confounder(x).abs().max() == 0


def test_two_networks_share_no_weight() -> None:
    model = build()
    label, confounder = ({id(w) for w in n.parameters()} for n in (model.network, model.confounder_network))
    assert not label & confounder
    assert {id(w) for w in model.optimizer.param_groups[0]["params"]} == label
    assert {id(w) for w in model.confounder_optimizer.param_groups[0]["params"]} == confounder


@pytest.mark.parametrize("num_confounders", [None, 1])
def test_needs_confounder_values(num_confounders: int | None) -> None:
    hparams = hparams_registry.default_hparams("EX2L_MAE", "Debug28")
    with pytest.raises(ValueError, match=rf"at least 2 .*num_confounders={num_confounders}.*from_task"):
        REGISTRY["EX2L_MAE"]((3, 28, 28), K, K, hparams, num_confounders)


def test_needs_a_backbone_with_maps() -> None:
    mlp = {"mlp_width": 4, "mlp_depth": 2, "mlp_dropout": 0.0}
    hparams = {"nonlinear_classifier": False, "map_gradient": "constant", **mlp}
    with pytest.raises(ValueError, match=r"MLP has no feature maps.*convolutional"):
        REGISTRY["EX2L_MAE"]((5,), K, K, hparams, V)


def test_needs_confounder_labels() -> None:
    x, y = step_data(0)[0]
    with pytest.raises(ValueError, match=r"without confounder labels.*loaders"):
        build().update([*step_data(0), (x, y)])


def test_wrong_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="map_gradient 'detached' is unknown; take one of constant, full, none"):
        build(map_gradient="detached")


def test_rows_and_their_similarities() -> None:
    declared = {row: REGISTRY[row].SIMILARITY for row in ROWS}
    assert list(declared.values()) == ["mae", "cosine", "soft_dice", "js_distance", "ssim"]
    assert "EX2L" not in REGISTRY


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("dataset", "lr", "lr_range", "wd_range"),
    [("Debug28", 1e-3, (10**-4.5, 10**-2.5), (0, 0)), ("Debug224", 5e-5, (1e-5, 10**-3.5), (1e-6, 1e-2))],
)
def test_hparams(
    row: str, dataset: str, lr: float, lr_range: tuple[float, float], wd_range: tuple[float, float]
) -> None:
    default = hparams_registry.default_hparams(row, dataset)
    own = {"lambda_1": 1, "lambda_2": 0.3, "lr_l": lr, "lr_c": lr, "wd_l": 0, "wd_c": 0, "map_gradient": "constant"}
    assert {name: default[name] for name in own} == own

    draws = [hparams_registry.random_hparams(row, dataset, seed) for seed in range(30)]
    ranges = {"lambda_1": (0.1, 100), "lambda_2": (0.01, 10), "lr_l": lr_range, "lr_c": lr_range}
    for name, (low, high) in {**ranges, "wd_l": wd_range, "wd_c": wd_range}.items():
        assert all(low <= draw[name] <= high for draw in draws)
        assert len({draw[name] for draw in draws}) == (1 if low == high else 30)
    assert {draw["map_gradient"] for draw in draws} == {"constant"}
