import numpy as np
import pytest
import torch

from domainbed import algorithms
from domainbed.algorithms import rsc as rsc_module


def slow_masks(slow, features, y, f_factor, b_factor):
    """Which features of which images stay, image by image with numpy's percentiles."""
    kept, changes = [], []
    for row, label in zip(features.detach(), y.tolist(), strict=True):
        row.requires_grad_()
        logits = slow.classifier(row[None])[0]
        gradient = torch.autograd.grad(logits[label], row)[0].numpy()
        kept.append(gradient < np.percentile(gradient, (1 - f_factor) * 100))
        muted = slow.classifier((row * torch.from_numpy(kept[-1]))[None])[0]
        changes.append((logits.softmax(0)[label] - muted.softmax(0)[label]).item())
    whole = np.array(changes) < np.percentile(changes, (1 - b_factor) * 100)
    return torch.from_numpy(np.array([mask | stays for mask, stays in zip(kept, whole, strict=True)]))


@pytest.mark.parametrize("nonlinear", [False, True])  # a linear head's gradients are the same for all images of a class
@pytest.mark.parametrize(("f_factor", "b_factor"), [(1 / 3, 1 / 3), (0.45, 0.2), (0.05, 0.5)])
def test_updates_equal_written_out_training(
    build, minibatches, slow_network, cross_entropy, nonlinear, f_factor, b_factor
):
    hparams = {"rsc_f_drop_factor": f_factor, "rsc_b_drop_factor": b_factor, "nonlinear_classifier": nonlinear}
    rsc = build("RSC", mlp_width=8, **hparams)
    slow = slow_network(rsc)
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for _ in range(3):
        step = rsc.update(minibatches)
        features = slow.featurizer(x)
        mask = slow_masks(slow, features, y, f_factor, b_factor)
        assert 0 < (~mask.all(1)).sum() < 18
        loss = cross_entropy(slow.classifier(features * mask), y)
        slow.adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        slow.assert_equal()


@pytest.mark.parametrize("off", ["rsc_f_drop_factor", "rsc_b_drop_factor"])
def test_without_one_of_the_factors_it_is_erm(build, minibatches, off):
    rsc, erm = build("RSC", **{off: 0.0}), build("ERM")
    for _ in range(3):
        assert rsc.update(minibatches)["loss"] == pytest.approx(erm.update(minibatches)["loss"], rel=1e-12)
    torch.testing.assert_close(rsc.classifier.weight, erm.classifier.weight)


def test_muting_changes_the_weights(build, minibatches):
    results = []
    for hparams in (algorithms.RSC.CONTROL, {}):
        rsc = build("RSC", **hparams)
        for _ in range(3):
            rsc.update(minibatches)
        results.append(rsc.classifier.weight.detach())
    assert not torch.allclose(*results)


def test_factors_of_one_leave_only_the_bias(build, minibatches):
    rsc = build("RSC", rsc_f_drop_factor=1.0, rsc_b_drop_factor=1.0)
    y = torch.cat([y for _, y in minibatches])
    expected = torch.nn.functional.cross_entropy(rsc.classifier.bias.expand(18, 3), y).item()
    assert rsc.update(minibatches)["loss"] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_quantile_is_exact_in_any_precision(dtype):
    """The 4th of 7 values is the median itself, so it is not below it; 100 numbers of 1/3 cut between two."""
    below = rsc_module._all_but_the_largest
    values = torch.tensor([3.0, 1, 0, 6, 2, 5, 4], dtype=dtype)
    assert below(values, 0.5).tolist() == [False, True, True, False, True, False, False]
    assert below(torch.randperm(100).to(dtype), 1 / 3).sum() == 66
    for n in (4, 16, 130, 286):  # 1/3 of n - 1 is whole
        assert below(torch.linspace(-1, 1, n), 1 / 3).sum() == 2 * (n - 1) / 3


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_other_shares_are_refused(build, value):
    with pytest.raises(ValueError, match=rf"hparam rsc_f_drop_factor is {value}; .* give a number in \[0, 1\]"):
        build("RSC", rsc_f_drop_factor=value)


def test_autocast_makes_no_ties(build):
    """Gradients that bfloat16 would round to the same number still have an order."""
    rsc = build("RSC", rsc_f_drop_factor=0.5, rsc_b_drop_factor=1.0).float()
    with torch.no_grad():
        rsc.classifier.weight.copy_(1 + torch.arange(4) / 10_000)
    with torch.autocast("cpu", torch.bfloat16):
        kept = rsc._kept(torch.ones(2, 4, dtype=torch.bfloat16), torch.tensor([0, 1]))
    assert kept.tolist() == [[True, True, False, False]] * 2
