import math

import pytest
import torch

from domainbed import hparams_registry
from domainbed.algorithms import RDM

GAMMAS = [10.0**power for power in range(-4, 4)]


def slow_mmd(a, b):
    def mean_kernel(u, v):
        return sum(torch.exp(-gamma * (s - t) ** 2) for gamma in GAMMAS for s in u for t in v) / (len(u) * len(v))

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def slow_variance(a):
    mean = sum(a) / len(a)
    return sum((s - mean) ** 2 for s in a) / (len(a) - 1)


@pytest.fixture
def slow_terms(cross_entropy):
    """The three terms of the loss, image by image."""

    def terms(slow, minibatches):
        parts = [
            [cross_entropy(slow.logits(row[None]), label[None]) for row, label in zip(x, y, strict=True)]
            for x, y in minibatches
        ]
        risks = [sum(part) / len(part) for part in parts]
        worst, everything = parts[risks.index(max(risks))], [risk for part in parts for risk in part]
        variance = slow_variance(everything) + slow_variance(worst)
        return sum(risks) / len(risks), slow_mmd(worst, everything), variance

    return terms


def test_updates_equal_written_out_training(build, minibatches, slow_network, slow_terms):
    weights = {"rdm_lambda": 4.0, "variance_weight": 0.3}
    rdm = build("RDM", rdm_penalty_anneal_iters=2, rdm_lr=0.004, **weights)
    slow = slow_network(rdm)
    for update in range(4):
        step = rdm.update(minibatches)
        risk, matching, variance = slow_terms(slow, minibatches)
        if update == 2:
            slow.adam.reset()
            slow.adam.lr = 0.004
        loss = risk + (4.0 * matching + 0.3 * variance if update >= 2 else 0.0)
        slow.adam.descend(loss)
        assert step == pytest.approx(
            {
                "update_count": update + 1,
                "total_loss": loss.item(),
                "erm_loss": risk.item(),
                "matching_penalty": matching.item(),
                "variance_penalty": variance.item(),
                "rdm_lambda": 4.0,
            },
            rel=1e-7,
        )
        slow.assert_equal()
    assert rdm.update_count.tolist() == [4]


@pytest.mark.parametrize("weights", [{"rdm_lambda": 20.0}, {"variance_weight": 5.0}])
def test_each_penalty_changes_the_weights(build, minibatches, weights):
    results = []
    for hparams in (RDM.CONTROL, RDM.CONTROL | weights):
        rdm = build("RDM", rdm_penalty_anneal_iters=0, rdm_lr=0.01, **hparams)
        for _ in range(3):  # Adam's first step knows only the signs
            rdm.update(minibatches)
        results.append(rdm.classifier.weight.detach())
    assert not torch.allclose(*results)


def test_the_control_is_the_mean_risk(build, minibatches, slow_network):
    control = build("RDM", rdm_penalty_anneal_iters=0, rdm_lr=0.01, **RDM.CONTROL)
    slow = slow_network(control)
    for _ in range(3):
        slow.adam.descend(sum(slow.risk(x, y) for x, y in minibatches) / 3)
        control.update(minibatches)
    slow.assert_equal()


def test_mmd_by_hand(build):
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected = 2 * sum(1 - math.exp(-gamma) for gamma in GAMMAS)
    assert build("RDM").mmd(zero, one).item() == pytest.approx(expected)
    assert build("RDM").mmd(one, one).item() == 0.0


def test_close_risks_are_told_apart_in_float32(build):
    """Computed as a^2 + b^2 - 2ab, float32 rounds a squared distance of 1e-6 at 5 nats away."""
    x = torch.tensor([5.0, 5.001], dtype=torch.float64)
    exact = build("RDM").mmd(x[:1], x).item()
    assert build("RDM").mmd(x[:1].float(), x.float()).item() == pytest.approx(exact, rel=2e-2)


def test_single_rows_and_single_parts_stay_finite(build, minibatches):
    rdm = build("RDM", rdm_penalty_anneal_iters=0)
    for step in ([(x[:1], y[:1]) for x, y in minibatches], minibatches[:1]):
        assert all(math.isfinite(value) for value in rdm.update(step).values())
    assert all(torch.isfinite(parameter).all() for parameter in rdm.parameters())


def test_held_out_minibatches_are_taken_and_not_read(build, minibatches):
    assert build("RDM").update(minibatches, None, minibatches) == build("RDM").update(minibatches)


def test_annealing_goes_on_after_loading(build, minibatches):
    rdm, fresh = (build("RDM", rdm_penalty_anneal_iters=1) for _ in range(2))
    rdm.update(minibatches)
    fresh.load_state_dict(rdm.state_dict())
    assert fresh.update(minibatches) == rdm.update(minibatches)


@pytest.mark.parametrize(
    ("dataset", "defaults"),
    [
        ("RotatedMNIST", (64, 5.0, 1500, 0.004)),
        ("PACS", (88, 5.0, 1500, 0.004)),
        ("OfficeHome", (88, 5.0, 1500, 0.0)),
        ("TerraIncognita", (40, 5.0, 1500, 0.0)),
        ("DomainNet", (40, 0.5, 2400, 0.0)),
    ],
)
def test_hparams_depend_on_the_dataset(dataset, defaults):
    names = ("batch_size", "rdm_lambda", "rdm_penalty_anneal_iters", "variance_weight")
    hparams = hparams_registry.default_hparams("RDM", dataset)
    assert tuple(hparams[name] for name in names) == defaults
    assert hparams["rdm_lr"] == 1.5e-5
