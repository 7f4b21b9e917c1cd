import math

import pytest
import torch

from domainbed import algorithms

ACTIVATIONS = {
    "tanh": lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()),
    "sigmoid": lambda z: 1 / (1 + (-z).exp()),
    "relu": lambda z: z * (z > 0),
}


class SlowDiscriminator:
    """The discriminator's layers, leaky ReLU between."""

    def __init__(self, module):
        self.module = module
        self.weights = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def __call__(self, x):
        for weight, bias in zip(self.weights[:-2:2], self.weights[1:-2:2], strict=True):
            z = x @ weight.T + bias
            x = z * torch.where(z > 0, 1.0, 0.01)
        return (x @ self.weights[-2].T + self.weights[-1])[:, 0]

    def assert_equal(self):
        for weight, parameter in zip(self.weights, self.module.parameters(), strict=True):
            torch.testing.assert_close(parameter.detach(), weight.detach(), rtol=1e-7, atol=1e-9)


def slow_bce(logits, target):
    p = 1 / (1 + (-logits).exp())
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


@pytest.mark.parametrize(
    ("output", "least", "smoothing", "layers"), [("tanh", -1, 0.0, 1), ("relu", 0, 0.3, 2), ("sigmoid", 0, 0.0, 0)]
)
def test_updates_equal_a_written_out_game(
    build, minibatches, slow_network, slow_adam, cross_entropy, output, least, smoothing, layers
):
    urm = build(
        "URM",
        urm_adv_lambda=0.6,
        urm_generator_output=output,
        urm_discriminator_label_smoothing=smoothing,
        urm_discriminator_hidden_layers=layers,
        urm_discriminator_lr=0.02,
    )
    slow, discriminator = slow_network(urm), SlowDiscriminator(urm.discriminator)
    adam = slow_adam(discriminator.weights, 0.02, 0.1)
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for seed in range(3):
        features = ACTIVATIONS[output](slow.featurizer(x))
        loss = cross_entropy(slow.classifier(features), y) + 0.6 * slow_bce(discriminator(features), 1.0)
        slow.adam.descend(loss)
        torch.manual_seed(seed)
        noise = least + (1 - least) * torch.rand(features.shape, dtype=torch.float64)
        real, fake = 1.0, 0.0
        if smoothing:
            real, fake = 1 - smoothing + smoothing * torch.rand(18), smoothing * torch.rand(18)
        of_noise, of_features = discriminator(noise), discriminator(features.detach())
        adam.descend(slow_bce(of_noise, real) + 0.6 * slow_bce(of_features, fake))
        torch.manual_seed(seed)
        assert urm.update(minibatches) == {"loss": pytest.approx(loss.item(), rel=1e-8)}
        slow.assert_equal()
        discriminator.assert_equal()
    expected = ACTIVATIONS[output](slow.featurizer(x))
    torch.testing.assert_close(urm.return_feats(x), expected)
    torch.testing.assert_close(urm.predict(x), slow.classifier(expected))


def weights(algorithm):
    return torch.cat([weight.detach().flatten() for weight in algorithm.network.parameters()])


def test_the_control_is_erm_with_the_activation_and_the_method_is_not(build, minibatches):
    erm = build("ERM")
    erm.featurizer.activation = torch.nn.Tanh()
    runs = [erm, build("URM", **algorithms.URM.CONTROL), build("URM", urm_adv_lambda=0.5)]
    for algorithm in runs:
        for _ in range(3):
            algorithm.update(minibatches)
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]))
    assert not torch.allclose(weights(runs[0]), weights(runs[2]))


def test_features_come_nearer_to_uniform_ones(build, minibatches):
    """All images of one class: only the discriminator has a say in where their features go."""
    alike = [(x, torch.zeros_like(y)) for x, y in minibatches]
    x, spread = torch.cat([x for x, _ in alike]), {}
    for weight in (0.0, 1.0):
        urm = build("URM", urm_adv_lambda=weight, weight_decay=0.0, urm_discriminator_lr=0.01)
        torch.manual_seed(0)
        for _ in range(150):
            urm.update(alike)
        values = urm.return_feats(x).detach().sort(0).values
        quantiles = torch.linspace(-1, 1, len(values), dtype=values.dtype)[:, None]
        spread[weight] = (values - quantiles).abs().mean().item()
    assert spread[1.0] < 0.8 * spread[0.0]


def test_the_discriminator_has_domainbeds_names(build):
    names = [name for name in build("URM", urm_discriminator_hidden_layers=2).state_dict() if "discriminator" in name]
    layers = ("dense1", "dense2", "dense3", "output")
    assert names == [f"discriminator.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert [name for name, _ in build("URM").discriminator.named_children()] == [
        "dense1", "act1", "dense2", "act22", "output",
    ]  # fmt: skip


def test_the_discriminators_optimizer_is_its_own(build):
    urm = build("URM", urm_discriminator_optimizer="sgd", urm_discriminator_lr=0.3, momentum=0.1)
    (group,) = urm.discriminator_opt.param_groups
    assert isinstance(urm.optimizer, torch.optim.Adam)
    assert isinstance(urm.discriminator_opt, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.9, 0.1)


def test_it_trains_under_autocast(build, minibatches):
    urm = build("URM", urm_discriminator_label_smoothing=0.1).float()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = urm.update([(x.float(), y) for x, y in minibatches])["loss"]
    assert math.isfinite(loss)
    assert all(weight.isfinite().all() for weight in urm.parameters())


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("urm", "other", "is 'other'; take adversarial"),
        ("urm_generator_output", "identity", "is 'identity'; take tanh or sigmoid or relu"),
        ("urm_discriminator_optimizer", "sdg", "is 'sdg'; take adam or sgd"),
        ("urm_discriminator_label_smoothing", 1.5, "is 1.5; give a number from 0 to 1"),
        ("urm_discriminator_hidden_layers", -1, "is -1; give 0 or more"),
    ],
)
def test_values_that_mean_nothing_are_refused(build, name, value, advice):
    with pytest.raises(ValueError, match=f"hparam {name} {advice}"):
        build("URM", **{name: value})


def test_a_featurizer_without_activation_is_refused(build, monkeypatch):
    def bare(input_shape, hparams):
        featurizer = torch.nn.Linear(5, 4)
        featurizer.n_outputs = 4
        return featurizer

    monkeypatch.setattr("domainbed.networks.Featurizer", bare)
    with pytest.raises(
        ValueError, match="URM replaces the featurizer's last module, `activation`, and Linear has none"
    ):
        build("URM")
