import numpy as np
import pytest
import torch


def test_updates_equal_written_out_training(build, minibatches, slow_network, cross_entropy):
    mixup = build("Mixup", mixup_alpha=0.7)
    slow = slow_network(mixup)
    for seed in range(3):
        torch.manual_seed(seed)
        np.random.seed(seed)
        step = mixup.update(minibatches)
        torch.manual_seed(seed)
        np.random.seed(seed)
        order, loss = torch.randperm(3).tolist(), 0.0
        for i, j in zip(order, order[1:] + order[:1], strict=True):
            (x1, y1), (x2, y2) = minibatches[i], minibatches[j]
            t, n = np.random.beta(0.7, 0.7), min(len(y1), len(y2))
            logits = slow.logits(torch.stack([t * x1[k] + (1 - t) * x2[k] for k in range(n)]))
            loss = loss + (t * cross_entropy(logits, y1[:n]) + (1 - t) * cross_entropy(logits, y2[:n])) / 3
        slow.adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        slow.assert_equal()


def test_alpha_changes_the_loss(build, minibatches):
    losses = set()
    for alpha in (0.01, 100.0):
        torch.manual_seed(0)
        np.random.seed(0)
        losses.add(build("Mixup", mixup_alpha=alpha).update(minibatches)["loss"])
    assert len(losses) == 2


def test_in_batch_updates_equal_written_out_training(build, minibatches, slow_network, cross_entropy):
    mixup = build("InBatchMixup", mixup_alpha=0.7)
    slow = slow_network(mixup)
    x, y = torch.cat([m[0] for m in minibatches]), torch.cat([m[1] for m in minibatches])
    for seed in range(3):
        torch.manual_seed(seed)
        np.random.seed(seed)
        step = mixup.update(minibatches)
        torch.manual_seed(seed)
        np.random.seed(seed)
        t, order = np.random.beta(0.7, 0.7), torch.randperm(len(y)).tolist()
        logits = slow.logits(torch.stack([t * x[i] + (1 - t) * x[j] for i, j in enumerate(order)]))
        loss = t * cross_entropy(logits, y) + (1 - t) * cross_entropy(logits, y[order])
        slow.adam.descend(loss)
        assert step == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        slow.assert_equal()


def test_in_batch_control_is_erm_and_the_method_is_not(build, minibatches):
    erm, control, mixup = build("ERM"), build("InBatchMixup", mixup_alpha=0.0), build("InBatchMixup", mixup_alpha=5.0)
    np.random.seed(0)
    for algorithm in (erm, control, mixup):
        algorithm.update(minibatches)
    x = minibatches[0][0]
    assert torch.equal(control.predict(x), erm.predict(x))
    assert not torch.allclose(mixup.predict(x), erm.predict(x))


def test_in_batch_alpha_below_zero_is_refused(build):
    with pytest.raises(ValueError, match=r"mixup_alpha -0\.1: must not be negative"):
        build("InBatchMixup", mixup_alpha=-0.1)


def test_one_image_is_mixed_with_itself(build, minibatches):
    erm, mixup = build("ERM"), build("InBatchMixup")
    one = [(minibatches[0][0][:1], minibatches[0][1][:1])]
    assert mixup.update(one)["loss"] == pytest.approx(erm.update(one)["loss"])
