import pytest
import torch


def test_updates_equal_written_out_training(build, minibatches, slow_network):
    sd = build("SD", sd_reg=0.3)
    slow = slow_network(sd)
    x, y = (torch.cat(column) for column in zip(*minibatches, strict=True))
    for _ in range(3):
        step = sd.update(minibatches)
        logits = slow.logits(x)
        penalty = sum(z**2 for row in logits for z in row) / (18 * 3)
        risk = slow.risk(x, y)
        slow.adam.descend(risk + 0.3 * penalty)
        assert step == pytest.approx({"loss": risk.item(), "penalty": penalty.item()}, rel=1e-9)
        slow.assert_equal()


def test_the_control_is_erm(build, minibatches):
    sd, erm = build("SD", sd_reg=0.0), build("ERM")
    for _ in range(3):
        assert sd.update(minibatches)["loss"] == erm.update(minibatches)["loss"]
    assert torch.equal(sd.classifier.weight, erm.classifier.weight)


def test_the_penalty_shrinks_the_logits(build, minibatches):
    sizes = []
    for weight in (0.0, 10.0):
        sd = build("SD", sd_reg=weight)
        for _ in range(30):
            step = sd.update(minibatches)
        sizes.append(step["penalty"])
    assert sizes[1] < sizes[0] / 2
