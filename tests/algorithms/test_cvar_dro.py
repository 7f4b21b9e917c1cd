import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from domainbed.algorithms.cvar_dro import worst_share_weights


@pytest.mark.parametrize("alpha", [0.01, 1 / 12, 0.1, 0.25, 0.37, 0.5, 0.99, 1.0])
def test_weights_solve_the_linear_programme(alpha):
    """Over all q in the simplex with q_i <= 1 / (alpha m); below one whole loss the bound is 1, which never binds."""
    losses = np.random.RandomState(int(100 * alpha)).exponential(size=12)
    best = linprog(-losses, A_eq=np.ones((1, 12)), b_eq=[1.0], bounds=(0, 1 / (12 * alpha)))
    weights = worst_share_weights(torch.from_numpy(losses), alpha).numpy()
    assert weights == pytest.approx(best.x, abs=1e-9)
    assert weights @ losses == pytest.approx(-best.fun, rel=1e-9)


def test_the_boundary_loss_counts_by_its_fraction():
    weights = worst_share_weights(torch.tensor([1.0, 4.0, 2.0, 3.0, 0.0]), 0.5)  # 2.5 losses
    assert weights.tolist() == pytest.approx([0.0, 0.4, 0.2, 0.4, 0.0])


def test_less_than_one_loss_is_the_maximum_and_one_the_mean():
    losses = torch.tensor([1.0, 3.0, 2.0])
    assert worst_share_weights(losses, 0.01).tolist() == [0.0, 1.0, 0.0]
    assert worst_share_weights(losses, 1.0).tolist() == pytest.approx([1 / 3] * 3)
    assert worst_share_weights(losses[:1], 0.1).tolist() == [1.0]


def test_equal_losses_keep_their_sum_of_weights():
    assert worst_share_weights(torch.ones(10), 0.25).sum().item() == pytest.approx(1.0)


def test_updates_equal_written_out_training(build, minibatches, slow_network, cross_entropy):
    cvar = build("CVaR_DRO", cvar_alpha=0.3)
    slow = slow_network(cvar)
    for _ in range(3):
        step = cvar.update(minibatches)
        losses = [cross_entropy(slow.logits(x[i : i + 1]), y[i : i + 1]) for x, y in minibatches for i in range(len(y))]
        worst = sorted(losses, key=lambda loss: -loss.item())
        loss = (sum(worst[:5]) + 0.4 * worst[5]) / 5.4  # .3 of 18 losses
        slow.adam.descend(loss)
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert step["risk"] == pytest.approx(sum(losses).item() / 18, rel=1e-9)
        slow.assert_equal()


def test_the_control_is_erm_and_the_method_is_not(build, minibatches):
    erm, control, cvar = build("ERM"), build("CVaR_DRO", cvar_alpha=1.0), build("CVaR_DRO")
    for algorithm in (erm, control, cvar):
        algorithm.update(minibatches)
    x = minibatches[0][0]
    torch.testing.assert_close(control.predict(x), erm.predict(x))
    assert not torch.allclose(cvar.predict(x), erm.predict(x))


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(build, alpha):
    with pytest.raises(ValueError, match="give a share of the losses, above 0 and at most 1"):
        build("CVaR_DRO", cvar_alpha=alpha)
