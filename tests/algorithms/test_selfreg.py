import numpy as np
import pytest
import torch
from torch import nn


def slow_batch_norm(x, gamma, beta):
    mean = sum(x) / len(x)
    variance = sum((row - mean) ** 2 for row in x) / len(x)
    return torch.stack([(row - mean) / (variance + 1e-5) ** 0.5 * gamma + beta for row in x])


def slow_projection(weights, x):
    for layer in range(3):
        weight, bias, gamma, beta = weights[4 * layer : 4 * layer + 4]
        x = slow_batch_norm(x @ weight.T + bias, gamma, beta)
        x = x * (x > 0) if layer < 2 else x
    return x


def mean_square(a, b):
    return sum((v - w) ** 2 for v, w in zip(a.flatten(), b.flatten(), strict=True)) / a.numel()


def slow_loss(slow, weights, cross_entropy, x, y):
    """The definition, image by image; draws as the algorithm, class by class."""
    t, partners = np.random.beta(0.5, 0.5), {}
    for label in sorted(set(y)):
        rows = [i for i, k in enumerate(y) if k == label]
        for i, first, second in zip(rows, torch.randperm(len(rows)), torch.randperm(len(rows)), strict=True):
            partners[i] = rows[first], rows[second]
    features = slow.featurizer(x)
    logits, projected = slow.classifier(features), slow_projection(weights, features)
    risk = cross_entropy(logits, torch.tensor(y))
    total = 0.0
    for own, others, weight in ((logits, logits, 1.0), (features, projected, 0.3)):
        near = torch.stack([others[partners[i][0]] for i in range(len(y))])
        far = torch.stack([others[partners[i][1]] for i in range(len(y))])
        individual, mixed = mean_square(own, near), mean_square(own, t * near + (1 - t) * far)
        total = total + weight * (t * individual + (1 - t) * mixed)
    return risk, risk + min(risk.item(), 1.0) * total


@pytest.mark.parametrize(
    ("labels", "bias", "capped"),  # the labels that occur, the bias of class 2, and whether the risk is above 1
    [((0, 1, 2), 0.0, True), ((0, 1, 2), -4.0, True), ((1, 2), 4.0, True), ((2,), 4.0, False), ((0, 2), 1.0, False)],
)
def test_updates_equal_written_out_training(
    build, minibatches, slow_network, slow_adam, cross_entropy, labels, bias, capped
):
    selfreg = build("SelfReg")
    with torch.no_grad():
        selfreg.classifier.bias[2] = bias
    slow = slow_network(selfreg)
    weights = [parameter.detach().clone().requires_grad_() for parameter in selfreg.cdpl.parameters()]
    adam = slow_adam([*slow.adam.weights, *weights], 0.01, 0.1)
    minibatches = [(x, torch.tensor(labels)[y % len(labels)]) for x, y in minibatches]
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for seed in range(3):
        torch.manual_seed(seed), np.random.seed(seed)
        step = selfreg.update(minibatches)
        torch.manual_seed(seed), np.random.seed(seed)
        risk, loss = slow_loss(slow, weights, cross_entropy, x, y.tolist())
        assert (risk.item() > 1) == capped
        adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-7)}
        slow.assert_equal()
    for weight, parameter in zip(weights, selfreg.cdpl.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), weight.detach(), rtol=1e-6, atol=1e-8)


def test_the_regularizer_draws_a_class_together(build, minibatches):
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    spreads = []
    for name in ("ERM", "SelfReg"):
        algorithm = build(name, weight_decay=0.0)
        torch.manual_seed(0), np.random.seed(0)
        for _ in range(60):
            algorithm.update(minibatches)
        logits = algorithm.predict(x)
        spreads.append(sum(logits[y == k].var(0).mean().item() for k in range(3)))
    assert spreads[1] < spreads[0] / 2


def test_the_projection_is_trained(build, minibatches):
    selfreg = build("SelfReg")
    before = [parameter.detach().clone() for parameter in selfreg.cdpl.parameters()]
    selfreg.update(minibatches)
    assert not any(torch.equal(*pair) for pair in zip(before, selfreg.cdpl.parameters(), strict=True))


def test_state_has_domainbeds_names_and_shapes(build):
    state = build("SelfReg", mlp_width=4).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if name.startswith("cdpl") and value.ndim}
    linear = {
        "0.weight": (8, 4),
        "0.bias": (8,),
        "3.weight": (8, 8),
        "3.bias": (8,),
        "6.weight": (4, 8),
        "6.bias": (4,),
    }
    norms = {
        f"{i}.{name}": (n,)
        for i, n in ((1, 8), (4, 8), (7, 4))
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    assert shapes == {f"cdpl.{name}": shape for name, shape in (linear | norms).items()}


def test_one_image_is_refused(build, minibatches):
    x, y = minibatches[0]
    with pytest.raises(ValueError, match="needs 2; got 1; raise batch_size"):
        build("SelfReg").update([(x[:1], y[:1])])


@pytest.mark.parametrize(("width", "hidden"), [(2048, 2048), (8, 16)])
def test_hidden_width_of_the_projection(build, width, hidden):
    cdpl = build("SelfReg", mlp_width=width).cdpl
    assert [layer.out_features for layer in cdpl if isinstance(layer, nn.Linear)] == [hidden, hidden, width]
