"""eX2L against a slow re-implementation of each reading, its control, and plain empirical risk minimisation."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial import distance
from scipy.stats import entropy, pearsonr
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from domainbed import hparams_registry
from domainbed.algorithms.base import REGISTRY, Task
from domainbed.algorithms_ex2l import EX2L
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.evaluation import evaluate
from domainbed.loaders import Minibatch
from domainbed.splits import Split

Array = NDArray[np.float64]

SIMILARITIES = {
    "EX2L_MAE": "mae", "EX2L_MSE": "mse", "EX2L_RMSE": "rmse", "EX2L_SoftIoU": "soft_iou", "EX2L_KL": "kl",
    "EX2L_JSDivergence": "js_divergence", "EX2L_JSDistance": "js_distance", "EX2L_Cosine": "cosine", "EX2L_NCC": "ncc",
    "EX2L_SSIM": "ssim", "EX2L_SoftDice": "soft_dice",
}  # fmt: skip
ROWS = tuple(SIMILARITIES)
WATCHED = {
    "dead_maps", "dead_label_maps", "dead_confounder_maps", "map_overlap", "label_coverage", "confounder_coverage"
}  # fmt: skip
KEYS = {"loss", "label_loss", "confounder_loss", "confounder_acc", "similarity"} | WATCHED
READINGS: list[dict[str, Any]] = [
    {"map_gradient": "full"}, {"map_gradient": "none"}, {"map_target": "predicted"}, {"map_layer": "features.8"},
    {"map_relu": False}, {"map_normalisation": "max_live"}, {"one_logit": True}, {"similarity_gradient": "label"},
]  # fmt: skip
K, V = 2, 3


def build(
    row: str = "EX2L_MAE", shape: tuple[int, int, int] = (3, 36, 36), classes: int = K, values: int = V, **hparams: Any
) -> EX2L:
    settings = hparams_registry.default_hparams(row, "Debug28") | {"backbone": "small_cnn"} | hparams
    torch.manual_seed(0)
    return REGISTRY[row].from_task(Task(shape, classes, num_domains=classes * values, num_confounders=values), settings)


def step_data(seed: int, shape: tuple[int, int, int] = (3, 36, 36), rows: int = 2, values: int = V) -> list[Minibatch]:
    """One minibatch per group; every group has a mean colour of its own, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    minibatches = []
    for g in range(K * values):
        y, c = torch.full((rows,), g // values), torch.full((rows,), g % values)
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


def assert_equal_weights(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **tolerance or {"rtol": 0, "atol": 0})


def gradients(network: nn.Module) -> Tensor:
    """What the last update has left; zeros where nothing came."""
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in network.parameters()])


def slow_grad_cam(network: Any, x: Tensor, target: int | None, layer: int = 14, relu: bool = True) -> Array:
    """Grad-CAM of one image (3, H, W) at ``features.{layer}``; without a target, of the predicted class."""
    features, classifier = network[0].features, network[1]
    maps = features[: layer + 1](x[None]).detach().requires_grad_()
    logits = classifier(features[layer + 1 :](maps).mean((2, 3)))[0]
    (gradient,) = torch.autograd.grad(logits[logits.argmax() if target is None else target], maps)
    weights = gradient[0].double().mean((1, 2)).numpy()
    heatmap = sum(w * channel for w, channel in zip(weights, maps[0].detach().double().numpy(), strict=True))
    return np.maximum(heatmap, 0) if relu else heatmap


def on_unit_scale(score: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    return lambda a, b: score(a / a.max(), b / b.max())


def as_distributions(score: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    return lambda a, b: score(a.ravel() / a.sum(), b.ravel() / b.sum())


REFERENCES: dict[str, Callable[[Array, Array], float]] = {
    "mae": on_unit_scale(lambda a, b: -np.abs(a - b).mean()),
    "mse": on_unit_scale(lambda a, b: -((a - b) ** 2).mean()),
    "rmse": on_unit_scale(lambda a, b: -math.sqrt(((a - b) ** 2).mean())),
    "soft_iou": on_unit_scale(lambda a, b: (a * b).sum() / (a + b - a * b).sum()),
    "kl": as_distributions(lambda p, q: -entropy(q + 1e-3, p + 1e-3)),
    "js_divergence": as_distributions(lambda p, q: -(distance.jensenshannon(p, q) ** 2)),
    "js_distance": as_distributions(lambda p, q: -distance.jensenshannon(p, q)),
    "cosine": as_distributions(lambda p, q: 1 - distance.cosine(p, q)),
    "ncc": on_unit_scale(lambda a, b: pearsonr(a.ravel(), b.ravel()).statistic),
    "ssim": on_unit_scale(
        lambda a, b: structural_similarity(a, b, win_size=len(a), data_range=1.0, use_sample_covariance=True)
    ),
    "soft_dice": on_unit_scale(lambda a, b: 2 * (a * b).sum() / (a + b).sum()),
}


@pytest.mark.parametrize("row", ROWS)
def test_values_equal_a_slow_reimplementation(row: str) -> None:
    model = build(row, lambda_1=0.7, lambda_2=2.0)
    minibatches = step_data(1)
    x, y, c = joined(minibatches)
    before = copy.deepcopy(model)
    values = model.update(minibatches)

    networks = (before.network, before.confounder_network)
    maps = [
        [slow_grad_cam(network, image, int(target)) for network, target in zip(networks, targets, strict=True)]
        for image, *targets in zip(x, y, c, strict=True)
    ]
    live = [(a, b) for a, b in maps if a.max() > 0 and b.max() > 0]
    assert live
    similarity = np.mean([REFERENCES[SIMILARITIES[row]](a, b) for a, b in live])
    label_loss = -before.predict(x).log_softmax(1)[range(len(x)), y].mean().item()
    confounder_logits = before.predict_confounder(x)
    confounder_loss = -confounder_logits.log_softmax(1)[range(len(x)), c].mean().item()
    assert values == pytest.approx(
        {
            "loss": label_loss + 0.7 * confounder_loss + 2.0 * similarity,
            "label_loss": label_loss,
            "confounder_loss": confounder_loss,
            "confounder_acc": np.mean(confounder_logits.argmax(1).numpy() == c.numpy()),
            "similarity": similarity,
            "dead_maps": 1 - len(live) / len(x),
            "dead_label_maps": np.mean([a.max() == 0 for a, _ in maps]),
            "dead_confounder_maps": np.mean([b.max() == 0 for _, b in maps]),
            "map_overlap": np.mean([REFERENCES["soft_iou"](a, b) for a, b in live]),
            "label_coverage": np.mean([a.mean() / a.max() for a, _ in live]),
            "confounder_coverage": np.mean([b.mean() / b.max() for _, b in live]),
        },
        rel=1e-4,
        abs=1e-5,
    )


def raw_mae(a: Array, b: Array) -> float:
    return -float(np.abs(a - b).mean())


def minmax(heatmap: Array) -> Array:
    return (heatmap - heatmap.min()) / np.ptp(heatmap)


def signed_mae(a: np.ndarray, b: np.ndarray) -> float:
    return raw_mae(a / np.abs(a).max(), b / np.abs(b).max())


# With the score of two maps that each leads to.
SLOW_READINGS: list[tuple[dict[str, Any], Callable[[Array, Array], float]]] = [
    ({"map_target": "predicted"}, REFERENCES["mae"]),
    ({"map_layer": "features.8"}, REFERENCES["mae"]),  # the third ReLU of five
    ({"map_layer": "features.8", "map_target": "predicted", "map_relu": False}, signed_mae),
    ({"map_relu": False}, signed_mae),
    ({"map_normalisation": "max_live"}, REFERENCES["mae"]),
    ({"map_normalisation": "l1"}, as_distributions(raw_mae)),
    ({"map_normalisation": "none"}, raw_mae),
    ({"map_normalisation": "minmax"}, lambda a, b: raw_mae(minmax(a), minmax(b))),
    ({"map_normalisation": "minmax", "map_relu": False}, lambda a, b: raw_mae(minmax(a), minmax(b))),
]


@pytest.mark.parametrize(("reading", "score"), SLOW_READINGS)
def test_readings_equal_a_slow_reimplementation(
    reading: dict[str, Any], score: Callable[[Array, Array], float]
) -> None:
    minibatches, model = step_data(2, rows=3), build(**reading)
    before, true = copy.deepcopy(model), "map_target" not in reading
    how = {"layer": 8 if "map_layer" in reading else 14, "relu": reading.get("map_relu", True)}
    scores = []
    for x, y, c in zip(*joined(minibatches), strict=True):
        label_map = slow_grad_cam(before.network, x, int(y) if true else None, **how)
        confounder_map = slow_grad_cam(before.confounder_network, x, int(c) if true else None, **how)
        if np.abs(label_map).max() > 0 and np.abs(confounder_map).max() > 0:
            scores.append(score(label_map, confounder_map))
    assert model.update(minibatches)["similarity"] == pytest.approx(np.mean(scores), rel=1e-4, abs=1e-7)


def test_readings_differ() -> None:
    """So that the test above can't pass with hparams that have no effect."""
    same = [{}, {"map_normalisation": "max_live"}, {"map_normalisation": "minmax"}]  # values, since ReLU leaves a 0
    found = [build(**reading).update(step_data(2, rows=3))["similarity"] for reading in same]
    assert found == pytest.approx([found[0]] * 3)
    others = [reading for reading, _ in SLOW_READINGS if reading not in same]
    found += [build(**reading).update(step_data(2, rows=3))["similarity"] for reading in others]
    assert len({round(value, 6) for value in found}) == 1 + len(others)


FINITE = [*((row, 36, {}) for row in ROWS), *(("EX2L_MAE", 36, r) for r in READINGS), ("EX2L_MAE", 28, {})]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("row", "size", "reading"), FINITE)
def test_updates_are_finite(row: str, size: int, reading: dict[str, Any], autocast: bool) -> None:
    shape = (3, size, size)
    model = build(row, shape, **reading, backbone="small_cnn" if size == 36 else None)  # None: MNIST_CNN, by its size
    for seed in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            values = model.update(step_data(seed, shape))
        assert values.keys() == KEYS
        assert all(map(math.isfinite, values.values()))
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def trained(updates: int = 3, row: str = "EX2L_MAE", **hparams: Any) -> EX2L:
    model = build(row, **hparams)
    for seed in range(updates):
        model.update(step_data(seed))
    return model


def test_no_weight_and_no_gradient_are_the_same_control() -> None:
    assert_equal_weights(trained(lambda_2=0.0), trained(map_gradient="none"))


@pytest.fixture(scope="module")
def trained_alone() -> EX2L:
    """Both networks as plain empirical risk minimisation trains them, apart."""
    model = build(lr_l=2e-3, lr_c=5e-4, wd_l=0.01, wd_c=0.01)
    for network, lr, axis in ((model.network, 2e-3, 1), (model.confounder_network, 5e-4, 2)):
        optimizer = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=0.01)
        for seed in range(3):
            batch = joined(step_data(seed))
            optimizer.zero_grad()
            F.cross_entropy(network(batch[0]), batch[axis]).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize(
    ("row", "readings"),
    [
        *((row, {}) for row in ROWS),
        ("EX2L_MAE", {"lambda_2_ramp": 2, "similarity_gradient": "label"}),
        ("EX2L_MAE", {"map_layer": "features.8", "map_target": "predicted", "map_relu": False, "lambda_2": 100.0}),
        ("EX2L_MAE", {"map_normalisation": "max_live", "similarity_gradient": "confounder"}),
    ],
)
def test_control_trains_each_network_like_erm(row: str, readings: dict[str, Any], trained_alone: EX2L) -> None:
    control = trained(row=row, lr_l=2e-3, lr_c=5e-4, wd_l=0.01, wd_c=0.01, **{**readings, **EX2L.CONTROL})
    assert_equal_weights(control.network, trained_alone.network)
    assert_equal_weights(control.confounder_network, trained_alone.confounder_network)


def test_label_network_starts_like_erm() -> None:
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams("ERM", "Debug28") | {"backbone": "small_cnn"}
    erm = REGISTRY["ERM"]((3, 36, 36), K, K * V, hparams)
    assert_equal_weights(build().network, erm.network)


@pytest.mark.parametrize("policy", ["constant", "full"])
@pytest.mark.parametrize("row", ROWS)
def test_where_the_similarity_gradient_goes(row: str, policy: str) -> None:
    def of(**hparams: Any) -> list[Tensor]:
        """Gradients of the four parts in the first update."""
        model = build(row, **hparams)
        model.update(step_data(0))
        return [gradients(part) for part in (*model.network, *model.confounder_network)]

    none = of(map_gradient="none")
    label, confounder, both = (
        [got - erm for got, erm in zip(of(map_gradient=policy, similarity_gradient=to), none, strict=True)]
        for to in ("label", "confounder", "both")
    )
    reached = [policy == "full", True]  # of a head and of a featurizer: heads make the weights of the maps only
    assert [part.abs().max() > 0 for part in label] == [reached[1], reached[0], False, False]
    assert [part.abs().max() > 0 for part in confounder] == [False, False, reached[1], reached[0]]
    for a, b, total in zip(label, confounder, both, strict=True):
        torch.testing.assert_close(a + b, total, rtol=0, atol=0)


@pytest.mark.parametrize("to", ["label", "confounder", "both"])
def test_weights_that_differ_from_the_controls(to: str) -> None:
    control, model = trained(1, map_gradient="none"), trained(1, similarity_gradient=to)
    for name in ("featurizer", "confounder_featurizer"):
        pairs = zip(getattr(control, name).parameters(), getattr(model, name).parameters(), strict=True)
        moved = not all(torch.equal(a, b) for a, b in pairs)
        assert moved == (to == "both" or (to == "confounder") == name.startswith("confounder"))
    assert_equal_weights(control.classifier, model.classifier)  # Adam's first step knows of a head's own loss only
    assert_equal_weights(control.confounder_classifier, model.confounder_classifier)


def test_penalty_moves_the_maps_apart() -> None:
    minibatches = step_data(0)

    def final_similarity(policy: str) -> float:
        model = build("EX2L_Cosine", lambda_2=1.0, map_gradient=policy)
        return [model.update(minibatches)["similarity"] for _ in range(15)][-1]

    assert final_similarity("constant") < final_similarity("none") - 0.1


def test_weight_of_the_similarity_grows_to_lambda_2_and_stays() -> None:
    model, constant = build(lambda_2=0.8, lambda_2_ramp=4), build(lambda_2=0.8)
    weights = []
    for seed in range(6):
        weights.append(model.similarity_weight())
        values = model.update(step_data(seed))
        priced = values["loss"] - values["label_loss"] - values["confounder_loss"]
        assert priced == pytest.approx(weights[-1] * values["similarity"], abs=1e-6)
        assert constant.similarity_weight() == 0.8
    assert weights[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert weights[3:] == [0.8, 0.8, 0.8]


def test_state_dict_round_trip() -> None:
    model, fresh = trained(2, lambda_2_ramp=5), build(lambda_2_ramp=5)
    fresh.load_state_dict(model.state_dict())
    assert fresh.update_count.item() == 2
    assert fresh.similarity_weight() == pytest.approx(0.3 * 3 / 5)
    x, _, _ = joined(step_data(9))
    torch.testing.assert_close(fresh.predict(x), model.predict(x), rtol=0, atol=0)
    torch.testing.assert_close(fresh.predict_confounder(x), model.predict_confounder(x), rtol=0, atol=0)


def test_one_logit_is_two_that_are_each_others_negative() -> None:
    """With z the single logit, logits (-z/2, z/2) have the same risks and, up to a scale, the same heatmaps."""
    one, two = build(values=2, one_logit=True), build(values=2)
    for name in ("network", "confounder_network"):
        single, double = getattr(one, name), getattr(two, name)
        double[0].load_state_dict(single[0].state_dict())
        with torch.no_grad():
            for parameter, wide in zip(single[1].parameters(), double[1].parameters(), strict=True):
                wide.copy_(torch.cat([-parameter / 2, parameter / 2]))
    minibatches = step_data(1, values=2)
    assert one.update(minibatches) == pytest.approx(two.update(minibatches), rel=1e-5, abs=1e-6)
    for name in ("featurizer", "confounder_featurizer"):
        found, expected = gradients(getattr(one, name)), gradients(getattr(two, name))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_one_logit_is_for_networks_with_two_outputs() -> None:
    x, y, c = joined(step_data(0))
    model = build(one_logit=True)
    assert model.predict(x).shape == (len(x), 1)
    assert model.predict_confounder(x).shape == (len(x), V)
    assert build(classes=3, values=2, one_logit=True).predict_confounder(x).shape == (len(x), 1)
    with pytest.raises(ValueError, match=r"one_logit is for two classes.*there are 4 and 3"):
        build(classes=4, one_logit=True)
    split = Split(0, "in", InMemoryEnvironment(x, y, c), np.arange(len(x)), number=0)
    found = evaluate(model, [split], V, torch.device("cpu"))
    right = (model.predict(x)[:, 0] > 0) == (y == 1)
    assert found[0, "in"].average == right.double().mean().item()


def test_what_is_watched_by_hand() -> None:
    # Live pairs: (half, all) and (all times 3, a quarter). Soft IoU 8 / 16 and 4 / 16; means .5, 1 and 1, .25.
    half, quarter, ones, zero = torch.zeros(4, 4), torch.zeros(4, 4), torch.ones(4, 4), torch.zeros(4, 4)
    half[:2], quarter[:2, :2] = 7, 0.1
    label_maps = torch.stack([half, 3 * ones, zero, zero, ones])
    confounder_maps = torch.stack([ones, quarter, ones, zero, zero])
    _, values = build().mean_similarity(label_maps, confounder_maps)
    assert {name: values[name] for name in WATCHED} == pytest.approx(
        {
            "dead_maps": 3 / 5,
            "dead_label_maps": 2 / 5,
            "dead_confounder_maps": 2 / 5,
            "map_overlap": (8 / 16 + 4 / 16) / 2,
            "label_coverage": (0.5 + 1) / 2,
            "confounder_coverage": (1 + 0.25) / 2,
        }
    )


@pytest.mark.parametrize("row", ROWS)
def test_dead_maps_are_left_out_of_the_mean(row: str) -> None:
    model = build(row)
    label_maps, confounder_maps = torch.rand(4, 3, 3), torch.rand(4, 3, 3)
    label_maps[0], confounder_maps[2] = 0, 0
    similarity, values = model.mean_similarity(label_maps.requires_grad_(), confounder_maps)
    both_live = [1, 3]
    torch.testing.assert_close(similarity, model.similarity(label_maps[both_live], confounder_maps[both_live]).mean())
    assert values["dead_maps"] == 0.5
    assert values["dead_label_maps"] == values["dead_confounder_maps"] == 0.25
    (gradient,) = torch.autograd.grad(similarity, label_maps)
    assert gradient[[0, 2]].abs().max() == 0
    assert gradient[both_live].abs().amax(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("policy", ["constant", "full"])
@pytest.mark.parametrize("row", ROWS)
def test_all_maps_dead(row: str, policy: str) -> None:
    """Then the step is the control's: both networks go on learning their labels."""
    model, control = build(row, map_gradient=policy), build(row, map_gradient="none")
    for one in (model, control):
        nn.init.zeros_(one.classifier.weight)
        values = one.update(step_data(0))
    values_dead = model.mean_similarity(torch.zeros(2, 3, 3), torch.ones(2, 3, 3))[1]
    assert values["similarity"] == values_dead["similarity"] == 0
    assert values["dead_maps"] == values["dead_label_maps"] == 1
    assert values["loss"] == pytest.approx(values["label_loss"] + values["confounder_loss"])
    assert model.classifier.weight.abs().min() > 0
    assert_equal_weights(model, control)


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
    hparams = hparams_registry.default_hparams("EX2L_MAE", "Debug28") | mlp
    with pytest.raises(ValueError, match=r"MLP has no feature maps.*convolutional"):
        REGISTRY["EX2L_MAE"]((5,), K, K, hparams, V)


def test_needs_confounder_labels() -> None:
    x, y = step_data(0)[0]
    with pytest.raises(ValueError, match=r"without confounder labels.*loaders"):
        build().update([*step_data(0), (x, y)])


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"map_gradient": "detached"}, "map_gradient 'detached' is unknown; take one of constant, full, none"),
        ({"similarity_gradient": "none"}, "similarity_gradient 'none' is unknown; take one of both, label, confounder"),
        ({"map_normalisation": "softmax"}, "map_normalisation 'softmax' .* own, max, max_live, minmax"),
        ({"map_target": "label"}, "map_target 'label' is unknown; take one of true, predicted"),
    ],
)
def test_unknown_choices(hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**hparams)


@pytest.mark.parametrize("row", ROWS)
def test_maps_without_relu(row: str) -> None:
    name = REGISTRY[row].SIMILARITY
    if row in ("EX2L_MAE", "EX2L_MSE", "EX2L_RMSE", "EX2L_NCC", "EX2L_SSIM"):
        assert math.isfinite(build(row, map_relu=False).update(step_data(0))["similarity"])
        with pytest.raises(ValueError, match=r"or set map_normalisation to max|take own \(max\)"):
            build(row, map_relu=False, map_normalisation="l1")
        return
    with pytest.raises(ValueError, match=rf"map_relu false: {name} .*keep the ReLU"):
        build(row, map_relu=False)
    if row == "EX2L_Cosine":  # its own normalisation is by the sum, which can be 0 where values have both signs
        assert math.isfinite(build(row, map_relu=False, map_normalisation="max").update(step_data(0))["similarity"])


def test_rows_and_their_similarities() -> None:
    rows = {name: REGISTRY[name].SIMILARITY for name in REGISTRY if name.startswith("EX2L")}
    assert rows == SIMILARITIES
    assert list(rows) == list(ROWS)
    assert "EX2L" not in REGISTRY


@pytest.mark.parametrize(
    ("dataset", "lr", "lr_range", "wd_range"),
    [("Debug28", 1e-3, (10**-4.5, 10**-2.5), (0, 0)), ("Debug224", 5e-5, (1e-5, 10**-3.5), (1e-6, 1e-2))],
)
def test_hparams(dataset: str, lr: float, lr_range: tuple[float, float], wd_range: tuple[float, float]) -> None:
    row, readings = "EX2L_SoftDice", [*EX2L.CHOICES, "map_layer", "map_relu", "one_logit", "lambda_2_ramp"]
    default = hparams_registry.default_hparams(row, dataset)
    own = {"lambda_1": 1, "lambda_2": 0.3, "lr_l": lr, "lr_c": lr, "wd_l": 0, "wd_c": 0, "map_gradient": "constant"}
    assert {name: default[name] for name in own} == own
    assert all(hparams_registry.default_hparams(other, dataset) == default for other in ROWS)

    draws = [hparams_registry.random_hparams(row, dataset, seed) for seed in range(30)]
    ranges = {"lambda_1": (0.1, 100), "lambda_2": (0.01, 10), "lr_l": lr_range, "lr_c": lr_range}
    for name, (low, high) in {**ranges, "wd_l": wd_range, "wd_c": wd_range}.items():
        assert all(low <= draw[name] <= high for draw in draws)
        assert len({draw[name] for draw in draws}) == (1 if low == high else 30)
    assert all(draw[name] == default[name] for draw in draws for name in readings)  # chosen, never drawn


def hidden_in(minibatches: list[Minibatch], hide: Callable[[int], bool]) -> list[Minibatch]:
    """The same, but of the images whose position in the step says so the confounder is not annotated."""
    result, start = [], 0
    for minibatch in minibatches:
        hidden = torch.tensor([hide(start + i) for i in range(len(minibatch.c))])
        result.append(Minibatch(*minibatch, c=minibatch.c.masked_fill(hidden, -1)))
        start += len(hidden)
    return result


@pytest.mark.parametrize("shared", ["", "classifier", "features.9"])
@pytest.mark.parametrize("policy", ["constant", "full"])
def test_hidden_confounders_count_for_the_label_networks_risk_alone(shared: str, policy: str) -> None:
    """One step of plain SGD against a loss of two batches: all images for the label, the annotated for the rest."""
    sgd = {"optimizer": "sgd", "momentum": 0.0, "lr_l": 1.0, "lr_c": 1.0}
    model = build(shared_from=shared, map_gradient=policy, lambda_1=0.7, lambda_2=2.0, **sgd).double()
    minibatches = [Minibatch(x.double(), y, c=m.c) for m in step_data(1, rows=3) for x, y in [m]]
    x, y, c = joined(minibatches)
    seen = torch.arange(len(x)) % 3 > 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    (_, label_maps), (logits, confounder_maps) = model.explain(x[seen], y[seen], c[seen])
    similarity, watched = model.mean_similarity(label_maps, confounder_maps)
    label_loss, confounder_loss = F.cross_entropy(model.predict(x), y), F.cross_entropy(logits, c[seen])
    loss = label_loss + 0.7 * confounder_loss + 2 * similarity
    slopes = torch.autograd.grad(loss, list(model.parameters()))

    values = model.update(hidden_in(minibatches, lambda i: i % 3 == 0))
    expected = {"loss": loss, "label_loss": label_loss, "confounder_loss": confounder_loss}
    expected |= {"confounder_acc": (logits.argmax(1) == c[seen]).float().mean()}
    assert values == pytest.approx({name: v.item() for name, v in expected.items()} | watched, rel=1e-5)
    for (name, parameter), slope in zip(model.named_parameters(), slopes, strict=True):
        torch.testing.assert_close(before[name] - parameter.detach(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("row", ROWS)
def test_without_an_annotation_the_label_network_is_erms_to_the_bit(row: str) -> None:
    model, erm = build(row), build(row)
    optimizer = torch.optim.Adam(erm.network.parameters(), lr=1e-3)
    for seed in range(3):
        x, y, _ = joined(step_data(seed))
        values = model.update(hidden_in(step_data(seed), lambda i: True))
        loss = F.cross_entropy(erm.predict(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert values == {"loss": loss.item(), "label_loss": loss.item()} | dict.fromkeys(
            KEYS - {"loss", "label_loss"}, 0
        )
    assert_equal_weights(model.network, erm.network)
    assert_equal_weights(model.confounder_network, build(row).confounder_network)


@pytest.mark.parametrize("reading", [*READINGS, {"shared_from": "features.9"}, {"map_method": "layer_cam"}])
def test_readings_with_hidden_confounders_stay_finite(reading: dict[str, Any]) -> None:
    model = build(values=2, **reading)
    for seed, hide in enumerate([lambda i: i != 5, lambda i: i % 2 > 0, lambda i: True]):
        values = model.update(hidden_in(step_data(seed, values=2), hide))
        assert values.keys() == KEYS
        assert all(map(math.isfinite, values.values()))
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
