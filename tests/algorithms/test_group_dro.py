import dataclasses
import math

import numpy as np
import pytest
import torch

from domainbed import algorithms, hparams_registry, partitions
from domainbed.algorithms.base import Task
from domainbed.partitions import Examples

NETWORK = {"mlp_width": 4, "mlp_depth": 3, "mlp_dropout": 0.0}
TASK = Task((5,), 3, 3, part_counts=(4, 100, 2500))


def of_task(task: Task, **overrides):
    hparams = hparams_registry.default_hparams("GroupDRO", "Debug28") | NETWORK | overrides
    torch.manual_seed(0)
    return algorithms.get_algorithm_class("GroupDRO").from_task(task, hparams).double()


def test_updates_equal_written_out_training(build, minibatches, slow_network):
    dro = build("GroupDRO", groupdro_eta=0.5)
    slow, q = slow_network(dro), [1.0, 1.0, 1.0]
    for _ in range(3):
        step = dro.update(minibatches)
        risks = [slow.risk(x, y) for x, y in minibatches]
        q = [weight * math.exp(0.5 * risk.item()) for weight, risk in zip(q, risks, strict=True)]
        q = [weight / sum(q) for weight in q]
        loss = sum(weight * risk for weight, risk in zip(q, risks, strict=True))
        slow.adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        assert dro.q.tolist() == pytest.approx(q, rel=1e-9)
        slow.assert_equal()


def test_weight_moves_to_the_worst_minibatch(build, minibatches):
    dro = build("GroupDRO", groupdro_eta=1.0, lr=0.0)
    with torch.no_grad():
        dro.classifier.weight.zero_()
        dro.classifier.bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    always_third = [(x, torch.full_like(y, 2)) for x, y in minibatches[:2]]
    for _ in range(5):
        dro.update([*always_third, (minibatches[2][0], torch.zeros_like(minibatches[2][1]))])
    assert dro.q[2] > 0.999


def test_eta_zero_is_the_mean_risk(build, minibatches, slow_network):
    dro = build("GroupDRO", groupdro_eta=0.0)
    slow = slow_network(dro)
    assert dro.update(minibatches)["loss"] == pytest.approx(sum(slow.risk(*m).item() for m in minibatches) / 3)


def test_saved_q_goes_on(build, minibatches):
    dro, fresh = build("GroupDRO"), build("GroupDRO")
    dro.update(minibatches)
    fresh.load_state_dict(dro.state_dict())
    assert torch.equal(fresh.q, dro.q)


def test_domainbeds_empty_q_loads(build, minibatches):
    dro = build("GroupDRO")
    dro.update(minibatches)
    state = dro.state_dict() | {"q": torch.tensor([])}
    dro.load_state_dict(state)
    assert dro.q.tolist() == [1, 1, 1]
    assert state["q"].tolist() == []  # the caller's dict stays as it was


def test_the_adjustment_by_size_moves_q_alone(minibatches, slow_network):
    dro = of_task(TASK, groupdro_eta=0.5, groupdro_adjustment=2.0, lr=0.01, weight_decay=0.1)
    slow, q = slow_network(dro), [1.0, 1.0, 1.0]
    for _ in range(3):
        step = dro.update(minibatches)
        risks = [slow.risk(x, y) for x, y in minibatches]
        bounds = [2 / 2, 2 / 10, 2 / 50]  # C / sqrt(n)
        q = [
            weight * math.exp(0.5 * (risk.item() + bound)) for weight, risk, bound in zip(q, risks, bounds, strict=True)
        ]
        q = [weight / sum(q) for weight in q]
        loss = sum(weight * risk for weight, risk in zip(q, risks, strict=True))
        slow.adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        assert dro.q.tolist() == pytest.approx(q, rel=1e-9)
        slow.assert_equal()


def test_without_adjustment_sizes_play_no_part(minibatches):
    plain, sized = of_task(dataclasses.replace(TASK, part_counts=())), of_task(TASK)
    assert plain.update(minibatches) == sized.update(minibatches)
    assert torch.equal(plain.q, sized.q)
    adjusted = of_task(TASK, groupdro_adjustment=1.0)
    adjusted.update(minibatches)
    assert adjusted.q[0] > plain.q[0]  # the smallest part counts more
    assert adjusted.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("counts", [(), (4, 100), (4, 0, 2500)])
def test_the_adjustment_needs_sizes(counts):
    with pytest.raises(ValueError, match=r"groupdro_adjustment 1.0 needs .* each of the 3 minibatches"):
        of_task(dataclasses.replace(TASK, part_counts=counts), groupdro_adjustment=1.0)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_an_adjustment_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=r"hparam groupdro_adjustment is .*: give C, a number of at least 0"):
        of_task(TASK, groupdro_adjustment=wrong)


def test_hparams_of_domainbed_lack_the_adjustment(minibatches):
    hparams = hparams_registry.default_hparams("GroupDRO", "Debug28") | NETWORK
    hparams.pop("groupdro_adjustment", None)
    dro = algorithms.get_algorithm_class("GroupDRO")((5,), 3, 3, hparams).double()
    assert math.isfinite(dro.update(minibatches)["loss"])


def test_groups_that_never_occur_in_training_have_no_weight():
    """Of 2 x 3 groups three occur, and the images of label 1 that are not annotated are a fourth."""
    y, c = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 2, 2, 1, -1, -1])
    parts = partitions.REGISTRY["group"](Examples(lambda: y, c, np.zeros(6, dtype=int), num_confounders=3))
    dro = of_task(Task((5,), 2, len(parts), 3, part_counts=tuple(len(part.positions) for part in parts)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    for _ in range(3):
        dro.update([(x[part.positions], torch.from_numpy(y)[part.positions]) for part in parts])
    assert len(dro.q) == 4
    assert dro.q.min() > 0.2
    assert dro.q.sum().item() == pytest.approx(1)


def test_an_empty_minibatch_has_no_risk(minibatches, slow_network):
    """Its q is not raised, and shrinks as the others' grow."""
    dro = of_task(TASK, groupdro_eta=0.5, lr=0.01, weight_decay=0.1)
    slow = slow_network(dro)
    empty = minibatches[1][0][:0], minibatches[1][1][:0]
    step = dro.update([minibatches[0], empty, minibatches[2]])
    first, third = (slow.risk(*minibatches[i]) for i in (0, 2))
    q = [math.exp(0.5 * first.item()), 1.0, math.exp(0.5 * third.item())]
    loss = (q[0] * first + q[2] * third) / sum(q)
    slow.adam.descend(loss)
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert dro.q.tolist() == pytest.approx([weight / sum(q) for weight in q])
    slow.assert_equal()
