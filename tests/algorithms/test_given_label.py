"""Matching given the label against distances that are written out pair by pair, with and without hidden confounders."""

import math

import pytest
import torch

from domainbed.algorithms.given_label import AbstractGivenLabel
from domainbed.loaders import Minibatch


def slow_mmd(x, y):
    """Kernel by kernel and pair by pair of images."""

    def mean_kernel(a, b):
        squares = torch.stack([((u - v) ** 2).sum() for u in a for v in b])
        return sum(torch.exp(-(10.0**power) * squares).mean() for power in range(-3, 4))

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def slow_coral(x, y):
    """From sums of outer products."""

    def covariance(a):
        return sum(torch.outer(u - a.mean(0), u - a.mean(0)) for u in a) / (len(a) - 1)

    return ((x.mean(0) - y.mean(0)) ** 2).mean() + ((covariance(x) - covariance(y)) ** 2).mean()


DISTANCES = {"MMD_GivenLabel": (slow_mmd, 1), "CORAL_GivenLabel": (slow_coral, 2)}
NAMES = list(DISTANCES)

# Label 0 has three confounder values in both minibatches, one of them once; label 1 has two; label 2 has one.
Y = [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 2]]
C = [[0, 0, 1, 2, -1, 0, 1], [0, 1, 1, 0, 1, 1]]


def steps_of(dtype=torch.float64, c=C):
    generator = torch.Generator().manual_seed(3)
    return [
        Minibatch(torch.randn(len(y), 5, generator=generator, dtype=dtype), torch.tensor(y), c=torch.tensor(values))
        for y, values in zip(Y, c, strict=True)
    ]


def slow_penalty(features, y, c, distance, fewest):
    """Mean over labels and pairs of values, found by looking at every image; and the number of pairs."""
    cells: dict[tuple[int, int], list] = {}
    for row, label, value in zip(features, y, c, strict=True):
        if value != -1:
            cells.setdefault((label, value), []).append(row)
    found = [
        distance(torch.stack(one), torch.stack(other))
        for (y1, c1), one in cells.items()
        for (y2, c2), other in cells.items()
        if y1 == y2 and c1 < c2 and min(len(one), len(other)) >= fewest
    ]
    return sum(found) / len(found), len(found)


@pytest.mark.parametrize("name", NAMES)
def test_updates_equal_written_out_training(build, slow_network, name):
    algorithm = build(name, mmd_gamma=3.0)
    slow = slow_network(algorithm)
    for _ in range(2):
        step = algorithm.update(steps_of())
        x, y = (torch.cat(column) for column in zip(*steps_of(), strict=True))
        penalty, pairs = slow_penalty(slow.featurizer(x), y.tolist(), [c for row in C for c in row], *DISTANCES[name])
        risk = slow.risk(x, y)
        slow.adam.descend(risk + 3.0 * penalty)
        assert step == pytest.approx({"loss": risk.item(), "penalty": penalty.item(), "pairs": pairs}, rel=1e-8)
        slow.assert_equal()
    assert pairs == {"MMD_GivenLabel": 4, "CORAL_GivenLabel": 2}[name]  # 3 and 1; without the single image 1 and 1


@pytest.mark.parametrize("name", NAMES)
def test_the_division_into_minibatches_does_not_matter(build, name):
    (first, second), whole = steps_of(), build(name)
    x, y = torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
    one = whole.update([Minibatch(x, y, c=torch.cat([first.c, second.c]))])
    assert build(name).update([first, second]) == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [lambda c: -1, lambda c: min(c, 0)])  # none annotated; one value only
def test_without_a_pair_the_penalty_is_0_and_the_update_erms(build, name, change):
    c = [[change(value) for value in row] for row in C]
    erm, algorithm = build("ERM"), build(name, mmd_gamma=5.0)
    for _ in range(2):
        step = algorithm.update(steps_of(c=c))
        assert step == {**erm.update(steps_of()), "penalty": 0, "pairs": 0}
    for ours, theirs in zip(algorithm.parameters(), erm.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_hidden_is_not_in_the_penalty_but_in_the_risk(build, name):
    first, second = steps_of()
    changed = first[0].clone()
    changed[4] += 10  # the image without annotation
    steps = [build(name).update([Minibatch(x, first[1], c=first.c), second]) for x in (first[0], changed)]
    assert steps[0]["penalty"] == pytest.approx(steps[1]["penalty"], rel=1e-12)
    assert steps[0]["loss"] != pytest.approx(steps[1]["loss"], rel=1e-3)


def test_the_hidden_of_one_label_are_no_group_of_another(build):
    """With two values, y V + c of (1, -1) would be that of (0, 1)."""
    features, y = torch.arange(12.0).view(6, 2), torch.tensor([0, 0, 0, 0, 1, 1])
    c = torch.tensor([0, 0, 1, 1, -1, -1])
    coral = build("CORAL_GivenLabel").float()
    (distance,) = coral.distances(features, y, c)
    assert distance == coral.mmd(features[:2], features[2:4])


@pytest.mark.parametrize("name", NAMES)
def test_the_control_is_erm_to_the_bit_and_the_method_is_not(build, name):
    erm, control, method = build("ERM"), build(name, **AbstractGivenLabel.CONTROL), build(name)
    for model in (erm, control, method):
        model.update(steps_of())
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (erm, control, method)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_confounder_that_only_follows_the_label_is_not_punished(build, name):
    """Given the label both values look alike, over all labels they don't: DomainBed's penalty by confounder pays."""
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    groups = [(0, 0)] * 4 + [(0, 1)] * 2 + [(1, 0)] * 2 + [(1, 1)] * 4
    y, c = torch.tensor(groups).T
    same = features[y]  # one point for each label
    algorithm = build(name)
    assert [d.item() for d in algorithm.distances(same, y, c)] == pytest.approx([0, 0], abs=1e-9)
    assert algorithm.mmd(same[c == 0], same[c == 1]) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_single_images_and_bfloat16_stay_finite(build, name):
    algorithm = build(name).float()
    c = [[0, 1, 2, 0, 1, 2, 0], [1, 2, -1, 1, 0, 0]]
    with torch.autocast("cpu", torch.bfloat16):
        step = algorithm.update(steps_of(torch.float32, c))
    assert all(map(math.isfinite, step.values()))
    assert all(parameter.isfinite().all() for parameter in algorithm.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_confounders_are_asked_for(build, minibatches, name):
    with pytest.raises(ValueError, match="without confounder labels"):
        build(name).update(minibatches)
