import pytest
import torch

from domainbed.algorithms import IRM


def scale_derivative(cross_entropy, logits, y):
    """d/ds of the risk of s * logits at s = 1, by autograd through a dummy scale, as the paper defines it."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(cross_entropy(logits * scale, y), scale, create_graph=True)[0]


def test_penalty_equals_finite_differences(cross_entropy):
    torch.manual_seed(0)
    logits, y, h = 3 * torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 4, (9,)), 1e-5
    slopes = []
    for rows in (range(0, 9, 2), range(1, 9, 2)):
        z, k = logits[list(rows)], y[list(rows)]
        slopes.append((cross_entropy((1 + h) * z, k) - cross_entropy((1 - h) * z, k)).item() / (2 * h))
    assert IRM._irm_penalty(logits, y).item() == pytest.approx(slopes[0] * slopes[1], rel=1e-7)


def test_penalty_is_not_rounded_to_bfloat16():
    torch.manual_seed(0)
    logits, y = 3 * torch.randn(9, 4).bfloat16(), torch.randint(0, 4, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        penalty = IRM._irm_penalty(logits, y)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(IRM._irm_penalty(logits.double(), y).item(), rel=1e-5)


def test_updates_anneal_and_restart_adam(build, minibatches, slow_network, cross_entropy):
    irm = build("IRM", irm_lambda=50.0, irm_penalty_anneal_iters=2)
    slow = slow_network(irm)
    for update in range(4):
        step = irm.update(minibatches)
        nll, penalty = 0.0, 0.0
        for x, y in minibatches:
            logits = slow.logits(x)
            nll = nll + cross_entropy(logits, y) / 3
            even = scale_derivative(cross_entropy, logits[::2], y[::2])
            penalty = penalty + even * scale_derivative(cross_entropy, logits[1::2], y[1::2]) / 3
        if update == 2:
            slow.adam.reset()
        loss = nll + (50.0 if update >= 2 else 1.0) * penalty
        slow.adam.descend(loss)
        expected = {"loss": loss.item(), "nll": nll.item(), "penalty": penalty.item()}
        assert step == pytest.approx(expected, rel=1e-8)
        slow.assert_equal()
    assert irm.update_count.tolist() == [4]


def test_penalty_weight_changes_the_weights(build, minibatches):
    results = []
    for weight in (0.0, 50.0):
        irm = build("IRM", irm_lambda=weight, irm_penalty_anneal_iters=0)
        for _ in range(3):  # Adam's first step knows only the signs
            irm.update(minibatches)
        results.append(irm.classifier.weight.detach())
    assert not torch.allclose(*results)


def test_annealing_goes_on_after_loading(build, minibatches):
    irm = build("IRM", irm_penalty_anneal_iters=1, irm_lambda=50.0)
    irm.update(minibatches)
    fresh = build("IRM", irm_penalty_anneal_iters=1, irm_lambda=50.0)
    fresh.load_state_dict(irm.state_dict())
    assert fresh.update(minibatches) == irm.update(minibatches)


def test_one_row_is_refused(build, minibatches):
    x, y = minibatches[0]
    with pytest.raises(ValueError, match=r"got the sizes \[1, 6, 5\]; raise batch_size"):
        build("IRM").update([(x[:1], y[:1]), *minibatches[1:]])
