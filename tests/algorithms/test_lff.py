import math

import pytest
import torch
import torch.nn.functional as F

from domainbed.algorithms.lff import LossAverages, generalised_cross_entropy
from domainbed.loaders import Minibatch


@pytest.fixture
def known(minibatches):
    """The minibatches, each of an environment of its own, that tell which images they hold."""
    return [
        Minibatch(x, y, e=torch.full_like(y, 2 * e), i=torch.arange(len(y))) for e, (x, y) in enumerate(minibatches)
    ]


class SlowLfF:
    """Both networks, and each image's running average in a dict, written out."""

    def __init__(self, lff, slow_network, slow_mlp, slow_adam):
        self.debiased = slow_network(lff)
        self.biased = slow_mlp(lff.biased_network[0]), slow_mlp(lff.biased_network[1])
        self.adam = slow_adam([weight for part in self.biased for weight in part.weights], 0.01, 0.1)
        self.averages = {}

    def losses(self, x, y):
        probabilities = [self.biased[1](self.biased[0](x)).softmax(1), self.debiased.logits(x).softmax(1)]
        return [[-p[row, label].log() for row, label in enumerate(y.tolist())] for p in probabilities]

    def average(self, losses, images):
        """Each image once: with the mean of its losses in the step."""
        for image in set(images):
            rows = [row for row, other in enumerate(images) if other == image]
            new = [sum(of[row].item() for row in rows) / len(rows) for of in losses]
            old = self.averages.get(image)
            self.averages[image] = new if old is None else [0.7 * a + 0.3 * b for a, b in zip(old, new, strict=True)]

    def relative(self, images, labels, network):
        classes = dict(zip(self.images, self.labels, strict=True))
        found = []
        for image, label in zip(images, labels, strict=True):
            peers = [of[network] for other, of in self.averages.items() if classes[other] == label]
            found.append(self.averages[image][network] / max(peers))
        return found

    def update(self, minibatches, ema):
        x, y = (torch.cat([m[part] for m in minibatches]) for part in (0, 1))
        losses = self.losses(x, y)
        hardness = [[loss.item() for loss in of] for of in losses]
        if ema:
            images = [pair for m in minibatches for pair in zip(m.e.tolist(), m.i.tolist(), strict=True)]
            self.images, self.labels = (
                [*getattr(self, "images", []), *images],
                [*getattr(self, "labels", []), *y.tolist()],
            )
            self.average(losses, images)
            hardness = [self.relative(images, y.tolist(), network) for network in (0, 1)]
        weights = [biased / (biased + own + 1e-8) for biased, own in zip(*hardness, strict=True)]
        loss = sum(w * own for w, own in zip(weights, losses[1], strict=True)) / len(y)
        powers = [math.exp(-0.7 * biased.item()) for biased in losses[0]]  # p^q, by which CE's gradient is weighed
        self.adam.descend(sum(power * biased for power, biased in zip(powers, losses[0], strict=True)) / len(y))
        self.debiased.adam.descend(loss)
        gce = sum((1 - power) / 0.7 for power in powers) / len(y)
        return {"loss": loss.item(), "biased_loss": gce, "mean_weight": sum(weights) / len(y)}


@pytest.mark.parametrize("ema", [True, False])
def test_updates_equal_written_out_training(build, known, slow_network, slow_mlp, slow_adam, ema):
    lff = build("LfF", lff_ema=ema)
    slow = SlowLfF(lff, slow_network, slow_mlp, slow_adam)
    x, y = known[1]
    twice = Minibatch(x, y, e=known[1].e, i=torch.arange(len(y)))
    for step in (known, [known[0], known[1], twice], known[1:]):  # images again, twice in a step, and absent
        assert lff.update(step) == pytest.approx(slow.update(step, ema), rel=1e-8)
        slow.debiased.assert_equal()
        for part in slow.biased:
            part.assert_equal()


def test_the_biased_networks_gradient_is_the_papers():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    losses = F.cross_entropy(logits, y, reduction="none")
    weighed = (losses.neg().exp() ** 0.7).detach() * losses
    for q, expected in ((0.7, weighed), (1e-9, losses)):
        (gradient,) = torch.autograd.grad(generalised_cross_entropy(losses, q).sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits, retain_graph=True)[0])


def test_averages_by_hand():
    averages = LossAverages(1, 0.7)
    first = averages.add(torch.tensor([[1.0, 3.0]]), torch.tensor([0, 1]), torch.tensor([4, 4]), torch.tensor([0, 2]))
    assert first.tolist() == [[1.0, 3.0]]  # the first loss as it is
    e, i, y = torch.tensor([4, 1, 4]), torch.tensor([0, 7, 0]), torch.tensor([0, 1, 0])
    again = averages.add(torch.tensor([[2.0, 5.0, 4.0]]), y, e, i)
    assert again[0].tolist() == pytest.approx([0.7 + 0.3 * 3, 5.0, 0.7 + 0.3 * 3])  # once, by the mean of 2 and 4
    assert averages.values.shape == (1, 5, 8)
    assert averages.largest(3)[0].tolist() == pytest.approx([1.6, 5.0, 0.0])


def test_what_the_biased_network_gets_right_counts_little(build):
    """Two images of one class: the biased network knows the first, the other network knows neither."""
    lff = build("LfF")
    losses, y, where = torch.tensor([[1e-3, 2.0], [1.0, 1.0]]), torch.tensor([0, 0]), torch.tensor([0, 1])
    easy, hard = lff._weights(losses, y, (torch.zeros_like(where), where)).tolist()
    assert easy == pytest.approx(5e-4 / (5e-4 + 1), rel=1e-4)
    assert hard == pytest.approx(0.5)


def test_losses_of_zero_give_finite_weights(build):
    lff, zeros = build("LfF"), torch.zeros(2, dtype=torch.int64)
    for identities in ((zeros, zeros), None):
        assert lff._weights(torch.zeros(2, 2), zeros, identities).tolist() == [0.0, 0.0]


def test_weights_change_the_update_of_what_predicts(build, known):
    erm, lff, plain = build("ERM"), build("LfF"), build("LfF", lff_ema=False)
    x = known[0][0]
    assert torch.equal(erm.predict(x), lff.predict(x))  # all begin alike
    for algorithm in (erm, lff, plain):
        algorithm.update(known)
    predictions = [algorithm.predict(x) for algorithm in (erm, lff, plain)]
    assert not any(torch.allclose(predictions[a], predictions[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_weights_of_one_are_erm(build, known, monkeypatch):
    erm, lff = build("ERM"), build("LfF")
    monkeypatch.setattr(lff, "_weights", lambda losses, y, identities: torch.ones_like(losses[0]))
    for algorithm in (erm, lff):
        algorithm.update(known)
    torch.testing.assert_close(lff.predict(known[0][0]), erm.predict(known[0][0]))


def test_model_files_hold_both_networks_and_no_averages(build, known):
    lff, fresh = build("LfF"), build("LfF")
    lff.update(known)
    assert {key.split(".")[0] for key in lff.state_dict()} == {"featurizer", "classifier", "network", "biased_network"}
    fresh.load_state_dict(lff.state_dict())
    assert torch.equal(fresh.predict(known[0][0]), lff.predict(known[0][0]))


def test_plain_pairs_need_the_variant_without_averages(build, minibatches):
    with pytest.raises(ValueError, match="set the hparam lff_ema to false"):
        build("LfF").update(minibatches)
    assert math.isfinite(build("LfF", lff_ema=False).update(minibatches)["loss"])


@pytest.mark.parametrize("q", [0.0, -1.0, 1.1])
def test_a_power_out_of_range_is_refused(build, q):
    with pytest.raises(ValueError, match=r"lff_q .*: give the power of the probability"):
        build("LfF", lff_q=q)
