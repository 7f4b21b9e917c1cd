import math

import numpy as np
import pytest
import torch

from domainbed import algorithms, hparams_registry, partitions
from domainbed.algorithms.base import Task
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.loaders import Minibatch, TrainingLoader
from domainbed.splits import Split

NETWORK = {"mlp_width": 4, "mlp_depth": 3, "mlp_dropout": 0.0, "lr": 0.01, "weight_decay": 0.1}
COUNTS, HIDDEN = (50, 0, 5, 20, 10, 1), (25, 0, 2)  # three labels, two confounder values
TASK = Task((5,), 3, 1, 2, COUNTS, hidden_counts=HIDDEN)


def of_task(name: str, task: Task = TASK, **overrides):
    hparams = hparams_registry.default_hparams(name, "Debug28") | NETWORK | overrides
    torch.manual_seed(0)
    return algorithms.get_algorithm_class(name).from_task(task, hparams).double()


def minibatch(y: list[int], c: list[int], seed: int = 0) -> Minibatch:
    x = torch.randn(len(y), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Minibatch(x, torch.tensor(y), c=torch.tensor(c))


STEPS = [
    [minibatch([0, 0, 1, 1, 2, 2, 2], [0, -1, 0, 1, 1, 0, -1])],
    [minibatch([0, 0, 0], [-1, -1, -1], 1), minibatch([2], [1], 2)],  # sizes differ, one has no annotated row
    [minibatch([1, 1], [1, 1], 3)],
]


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_updates_equal_written_out_training(slow_network, power):
    found = of_task("ReWeight", reweight_power=power)
    slow = slow_network(found)
    groups = {(y, c): COUNTS[2 * y + c] for y in range(3) for c in range(2)} | {(y, -1): HIDDEN[y] for y in range(3)}
    v = {key: n**-power for key, n in groups.items() if n}
    mean = sum(v.values()) / len(v)
    for step in STEPS:
        values = found.update(step)
        risks = [
            v[y.item(), c.item()] / mean * slow.risk(x[None], y[None])
            for m in step
            for x, y, c in zip(*m, m.c, strict=True)
        ]
        loss = sum(risks) / len(risks)
        slow.adam.descend(loss)
        assert values == {"loss": pytest.approx(loss.item(), rel=1e-9)}
        slow.assert_equal()


def test_weights_of_a_hand_made_case():
    """1/50, 1/5, 1/20, 1/10, 1 of the annotated groups and 1/25, 1/2 of the others: their sum is 1.91, of seven."""
    weights = of_task("ReWeight").weights
    expected = [0.02, 0, 0.04, 0.2, 0.05, 0, 0.1, 1, 0.5]  # by label; the last of each three are not annotated
    assert weights.flatten().tolist() == pytest.approx([7 * v / 1.91 for v in expected])
    assert weights.sum().item() == pytest.approx(7)


def test_power_zero_is_erm_and_another_is_not():
    def weights_after(name: str, **overrides) -> torch.Tensor:
        found = of_task(name, **overrides)
        for step in STEPS:
            found.update(step)
        return torch.cat([p.detach().flatten() for p in found.parameters()])

    control = algorithms.get_algorithm_class("ReWeight").CONTROL
    torch.testing.assert_close(weights_after("ReWeight", **control), weights_after("ERM"), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weights_after("ReWeight"), weights_after("ERM"), atol=1e-3)


def test_without_any_annotation_labels_are_weighted():
    found = of_task("ReWeight", Task((5,), 2, 1, 2, (0, 0, 0, 0), hidden_counts=(30, 10)))
    assert found.weights.flatten().tolist() == pytest.approx([0, 0, 0.5, 0, 0, 1.5])
    assert math.isfinite(found.update([minibatch([0, 1, 1], [-1, -1, -1])])["loss"])


def test_weights_are_of_the_run_not_of_the_model():
    found, other = of_task("ReWeight"), of_task("ReWeight", Task((5,), 3, 1, 2, (1,) * 6))
    assert found.state_dict().keys() == of_task("ERM").state_dict().keys()
    other.load_state_dict(found.state_dict())
    assert other.weights.flatten().tolist() == pytest.approx([1.0, 1.0, 0.0] * 3)


@pytest.mark.parametrize("power", [-0.5, math.nan, math.inf])
def test_a_power_that_is_none_is_refused(power):
    with pytest.raises(ValueError, match=r"hparam reweight_power is .*: give a number of at least 0"):
        of_task("ReWeight", reweight_power=power)


def test_what_reweighting_needs_is_said(build):
    with pytest.raises(ValueError, match="ReWeight needs the number of training images of each group"):
        build("ReWeight")
    x, y = STEPS[0][0]
    with pytest.raises(ValueError, match="came without confounder labels"):
        of_task("ReWeight").update([(x, y)])


NUMBERS = [60, 20, 12, 48]  # of the groups of two labels and two confounder values


def loader(name: str, seed: int = 0) -> TrainingLoader:
    g = torch.repeat_interleave(torch.arange(4), torch.tensor(NUMBERS))
    x = torch.randn(len(g), 5, generator=torch.Generator().manual_seed(0))
    split = Split(0, "in", InMemoryEnvironment(x, g // 2, g % 2), np.arange(len(g)), 0)
    partition = partitions.REGISTRY[algorithms.get_algorithm_class(name).PARTITION]
    return TrainingLoader([split], partition, 40, 2, seed)


@pytest.mark.parametrize(
    ("name", "shares", "distinct"),
    [
        ("RWG", [1 / 4] * 4, NUMBERS),
        ("RWY", [60 / 160, 20 / 160, 12 / 120, 48 / 120], NUMBERS),
        ("SUBG", [1 / 4] * 4, [12] * 4),
        ("SUBY", None, None),  # which images of a group are left depends on the seed
        ("ReWeight", [n / 140 for n in NUMBERS], NUMBERS),
    ],
)
def test_what_is_drawn_how_often(name, shares, distinct):
    drawn = np.concatenate([loader(name).draw(step) for step in range(300)])
    g = np.repeat(np.arange(4), NUMBERS)
    if shares is None:
        assert np.bincount(g[np.unique(drawn)] // 2).tolist() == [60, 60]
        return
    assert np.abs(np.bincount(g[drawn]) / len(drawn) - shares).max() < 0.02
    assert np.bincount(g[np.unique(drawn)]).tolist() == distinct


@pytest.mark.parametrize("name", ["RWG", "RWY", "SUBG", "SUBY"])
def test_the_update_is_erms(name):
    draws = loader(name)
    found, erm = (of_task(n, Task((5,), 2, len(draws.parts), 2)).float() for n in (name, "ERM"))
    for _, step in zip(range(2), draws, strict=False):
        assert found.update(step) == erm.update(step)
    assert all(torch.equal(*pair) for pair in zip(found.parameters(), erm.parameters(), strict=True))
