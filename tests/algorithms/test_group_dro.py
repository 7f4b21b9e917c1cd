import math

import pytest
import torch


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
