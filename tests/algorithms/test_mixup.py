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
