import copy

import pytest
import torch
import torch.nn.functional as F

from domainbed import algorithms, hparams_registry

HPARAMS = {"backbone": "small_cnn", "lr": 0.01, "weight_decay": 0.1, "batch_size": 4}


@pytest.fixture
def arm():
    """``arm(**overrides)``: ARM for three minibatches of images (2, 8, 8) of three classes, in float64."""

    def arm(**overrides):
        torch.manual_seed(0)
        hparams = hparams_registry.default_hparams("ARM", "Debug28") | HPARAMS | overrides
        return algorithms.ARM((2, 8, 8), 3, 3, hparams).double()

    return arm


@pytest.fixture
def images():
    """``images(n, seed)``: n images and labels."""

    def images(n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 2, 8, 8, generator=generator, dtype=torch.float64) + seed
        return x, torch.randint(0, 3, (n,), generator=generator)

    return images


def slow_context(weights, x):
    """ContextNet in training mode: convolution, batch normalisation, ReLU, twice, and a last convolution."""
    for layer in range(2):
        weight, bias, gamma, beta = weights[4 * layer : 4 * layer + 4]
        x = F.conv2d(x, weight, bias, padding=2)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5) ** 0.5
        x = F.relu(x * gamma[:, None, None] + beta[:, None, None])
    return F.conv2d(x, weights[8], weights[9], padding=2)


@pytest.mark.parametrize(
    ("sizes", "supports"),
    [((4, 4, 4), (4, 4, 4)), ((12,), (4, 4, 4)), ((5, 3, 4), (5, 3, 4)), ((2, 8), (2, 4, 4))],
)
def test_updates_equal_written_out_training(arm, images, slow_adam, cross_entropy, sizes, supports):
    method = arm()
    network = copy.deepcopy(method.network)  # that of ERM, whose numbers are tested there
    context = [parameter.detach().clone().requires_grad_() for parameter in method.context_net.parameters()]
    adam = slow_adam([*network.parameters(), *context], 0.01, 0.1)
    minibatches = [images(n, seed) for seed, n in enumerate(sizes)]
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for _ in range(3):
        step = method.update(minibatches)
        planes, seen, start = slow_context(context, x), [], 0
        for size in supports:
            plane = sum(planes[start : start + size]) / size
            seen += [torch.cat([image, plane]) for image in x[start : start + size]]
            start += size
        loss = cross_entropy(network(torch.stack(seen)), y)
        adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-8)}
    own = [*method.network.parameters(), *method.context_net.parameters()]
    for weight, parameter in zip([*network.parameters(), *context], own, strict=True):
        torch.testing.assert_close(parameter.detach(), weight.detach(), rtol=1e-6, atol=1e-8)


def test_the_context_changes_the_update(arm, images):
    """The same images in other supports."""
    parts = [images(4, seed) for seed in range(3)]
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    mixed = [(x[e::3], y[e::3]) for e in range(3)]
    results = []
    for minibatches in (parts, mixed):
        method = arm()
        for _ in range(2):
            method.update(minibatches)
        results.append(method.classifier.weight.detach())
    assert not torch.allclose(*results)


def test_the_context_network_is_trained(arm, images):
    method = arm()
    before = [parameter.detach().clone() for parameter in method.context_net.parameters()]
    method.update([images(4, seed) for seed in range(3)])
    assert not any(torch.equal(*pair) for pair in zip(before, method.context_net.parameters(), strict=True))


def test_images_are_predicted_with_those_of_their_support(arm, images):
    method, (x, _) = arm().eval(), images(11)
    even = method.predict(x[:8])
    torch.testing.assert_close(even, torch.cat([method.predict(x[:4]), method.predict(x[4:8])]))
    assert not torch.allclose(even, method.predict(x[[0, 4, 1, 5, 2, 6, 3, 7]])[[0, 2, 4, 6, 1, 3, 5, 7]])
    plane = method.context_net(x).mean(0).expand(11, 1, 8, 8)  # 11 rows are no multiple of 4
    torch.testing.assert_close(method.predict(x), method.network(torch.cat([x, plane], 1)))
    assert method.predict(x[:1]).shape == (1, 3)


def test_state_has_domainbeds_names(arm):
    state = arm().state_dict()
    assert {name.split(".")[0] for name in state} == {"featurizer", "classifier", "network", "context_net"}
    shapes = {name: tuple(value.shape) for name, value in state.items() if name.endswith(("0.weight", "6.weight"))}
    assert shapes["context_net.context_net.0.weight"] == (64, 2, 5, 5)
    assert shapes["context_net.context_net.6.weight"] == (1, 64, 5, 5)


@pytest.mark.parametrize(
    ("dataset", "default", "drawn"), [("PACS", 8, {8}), ("DomainNet", 8, {8}), ("RotatedMNIST", 64, None)]
)
def test_large_images_have_supports_of_eight(dataset, default, drawn):
    assert hparams_registry.default_hparams("ARM", dataset)["batch_size"] == default
    draws = [hparams_registry.random_hparams("ARM", dataset, seed)["batch_size"] for seed in range(5)]
    assert set(draws) == (drawn or {hparams_registry.random_hparams("ERM", dataset, s)["batch_size"] for s in range(5)})


def test_vectors_are_refused():
    hparams = hparams_registry.default_hparams("ARM", "Debug28") | {"mlp_width": 4, "mlp_depth": 3, "mlp_dropout": 0.0}
    with pytest.raises(ValueError, match=r"ARM adds a channel to images \(C, H, W\); the input's shape is \(5,\)"):
        algorithms.ARM((5,), 3, 3, hparams)
