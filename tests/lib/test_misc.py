"""Helpers against hand-made cases and slow re-implementations from their definitions."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from domainbed import console, seeding
from domainbed.lib import misc


class Opened(Dataset):
    """Examples (index, label) that counts how often one is opened."""

    def __init__(self, labels, **attributes):
        self.labels, self.opened = labels, 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        self.opened += 1
        return torch.tensor(float(i)), torch.tensor(self.labels[i])


def fisher_yates(n, seed):
    """DomainBed's permutation: numpy's shuffle spelled out, from the last position down."""
    keys, rng = list(range(n)), np.random.RandomState(seed)
    for i in range(n - 1, 0, -1):
        mask = (1 << i.bit_length()) - 1
        while (j := int(rng.randint(0, 2**32, dtype=np.uint32)) & mask) > i:  # masked rejection
            pass
        keys[i], keys[j] = keys[j], keys[i]
    return keys


CONTRACT = """seed_hash split_dataset accuracy make_weights_for_balanced_classes random_pairs_of_minibatches pdb
    split_meta_train_test print_row print_separator Tee MovingAverage ParamDict ErmPlusPlusMovingAvg l2_between_dicts
    distance proj Kernel GaussianKernel estimate_bandwidth KernelDensityEstimator Distribution1D Normal Nonparametric
    continuous_bisect_fun_left LARS SupConLossLambda"""


def test_every_name_that_domainbeds_users_import_is_exported():
    names: dict[str, object] = {}
    exec("from domainbed.lib.misc import *", names)
    assert set(CONTRACT.split()) <= names.keys()


# Splits


def test_torch_free_helpers_are_the_same_objects():
    assert misc.seed_hash is seeding.seed_hash
    assert (misc.print_row, misc.print_separator, misc.Tee) == (
        console.print_row, console.print_separator, console.Tee,
    )  # fmt: skip


@pytest.mark.parametrize(("size", "n", "seed"), [(10, 2, 0), (33, 32, 5), (99, 20, 1), (7, 0, 3), (7, 7, 3), (0, 0, 0)])
def test_split_is_index_identical_to_domainbeds(size, n, seed):
    data = list(range(100, 100 + size))
    first, rest = misc.split_dataset(data, n, seed)
    expected = fisher_yates(size, seed)
    assert (list(first.keys), list(rest.keys)) == (expected[:n], expected[n:])
    assert first.underlying_dataset is data
    assert [first[k] for k in range(len(first))] == [100 + i for i in expected[:n]]


@pytest.mark.parametrize("n", range(8))
def test_distinct_units_change_nothing(n):
    plain = misc.split_dataset(range(7), n, 4)
    by_unit = misc.split_dataset(range(7), n, 4, units=np.array([9, 3, 5, 1, 0, 7, 2]))
    assert [list(part.keys) for part in by_unit] == [list(part.keys) for part in plain]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 6, 10, 19])
def test_units_stay_together_in_permuted_order(n, seed):
    units = [4, 4, 0, 7, 0, 2, 2, 2, 4, 7, 1, 1, 3, 3, 3, 3, 0, 1, 2, 4]
    by_appearance = [4, 0, 7, 2, 1, 3]
    order = [by_appearance[k] for k in fisher_yates(6, seed)]
    taken = {1: 1, 6: 2, 10: 3, 19: 5}[n]  # round(6 n / 20), kept within [1, 5]
    first, rest = misc.split_dataset(range(20), n, seed, units=units)
    assert list(first.keys) == [i for unit in order[:taken] for i in range(20) if units[i] == unit]
    assert list(rest.keys) == [i for unit in order[taken:] for i in range(20) if units[i] == unit]


def test_all_or_none_by_unit():
    for n in (0, 4):
        first, rest = misc.split_dataset(range(4), n, units=[0, 0, 0, 0])
        assert (len(first), len(rest)) == (n, 4 - n)


@pytest.mark.parametrize(
    ("n", "units", "message"),
    [(5, None, "n is 5"), (-1, None, "n is -1"), (2, [0, 0, 0, 0], "one unit"), (2, [0, 1], "2 entries for 4")],
)
def test_split_explains_what_it_cannot_do(n, units, message):
    with pytest.raises(ValueError, match=message):
        misc.split_dataset(range(4), n, units=units)


# Class weights

LABELS = [0, 2, 2, 5, 2, 0]


def weights_by_counting(labels):
    counts = Counter(labels)
    return [1 / (counts[y] * len(counts)) for y in labels]


@pytest.mark.parametrize(
    ("dataset", "openings"),
    [
        (Opened(LABELS), 6),
        (Opened(LABELS, y=torch.tensor(LABELS)), 0),
        (Opened(LABELS, targets=LABELS), 0),
        (Opened(LABELS, targets=[1] * 6, target_transform=lambda y: y), 6),
    ],
)
def test_balanced_weights_open_examples_only_where_they_must(dataset, openings):
    weights = misc.make_weights_for_balanced_classes(dataset)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(weights_by_counting(LABELS))
    assert dataset.opened == openings


def test_balanced_weights_of_tensors_and_of_a_split_of_a_split():
    tensors = TensorDataset(torch.zeros(6), torch.tensor(LABELS))
    assert misc.make_weights_for_balanced_classes(tensors).tolist() == pytest.approx(weights_by_counting(LABELS))
    source = Opened(LABELS, y=np.array(LABELS))
    _, part = misc.split_dataset(misc.split_dataset(source, 5)[0], 1)
    labels = [int(y) for _, y in (part[k] for k in range(4))]
    source.opened = 0
    assert misc.make_weights_for_balanced_classes(part).tolist() == pytest.approx(weights_by_counting(labels))
    assert source.opened == 0


# Pairs of minibatches


def marked(*sizes):
    """Minibatches whose every x and y says which minibatch it is from."""
    return [(torch.full((size, 1), float(e)), torch.full((size,), e)) for e, size in enumerate(sizes)]


def origins(pairs):
    return [(int(y_i[0]), int(y_j[0])) for (_, y_i), (_, y_j) in pairs]


def test_random_pairs_form_one_circle():
    torch.manual_seed(1)
    pairs = misc.random_pairs_of_minibatches(marked(3, 2, 4, 4))
    torch.manual_seed(1)
    order = torch.randperm(4).tolist()
    assert origins(pairs) == [(order[k], order[(k + 1) % 4]) for k in range(4)]
    sizes = (3, 2, 4, 4)
    for ((x_i, y_i), (x_j, y_j)), (i, j) in zip(pairs, origins(pairs), strict=True):
        assert len(x_i) == len(y_i) == len(x_j) == len(y_j) == min(sizes[i], sizes[j])
        assert (x_i == i).all()
        assert (x_j == j).all()


@pytest.mark.parametrize("num_meta_test", [1, 2, 3])
def test_meta_split_gives_each_training_minibatch_a_test_one_in_turn(num_meta_test):
    torch.manual_seed(2)
    pairs = misc.split_meta_train_test(marked(3, 2, 4, 4, 3), num_meta_test)
    torch.manual_seed(2)
    order = torch.randperm(5).tolist()
    train, test = order[: 5 - num_meta_test], order[5 - num_meta_test :]
    assert origins(pairs) == [(i, test[k % num_meta_test]) for k, i in enumerate(train)]


def test_meta_split_leaves_something_to_train_on():
    assert len(misc.split_meta_train_test(marked(2, 2), num_meta_test=2)) == 1
    assert misc.split_meta_train_test(marked(2)) == []


# Accuracy


class Echo(nn.Module):
    """Predicts what it is shown."""

    def predict(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        return x


LOGITS = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [5.0, 6.0], [0.0, -1.0]])
TRUTH = torch.tensor([0, 1, 1, 0, 0])  # right, right, wrong, wrong, right


@pytest.mark.parametrize(("weights", "expected"), [(None, 3 / 5), (torch.tensor([1.0, 2, 3, 4, 5]), 8 / 15)])
def test_accuracy_weights_examples_in_the_loaders_order(weights, expected):
    network = Echo()
    loader = [(LOGITS[:2], TRUTH[:2]), (LOGITS[2:], TRUTH[2:])]
    assert misc.accuracy(network, loader, weights, "cpu") == pytest.approx(expected)
    assert network.training


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_accuracy_of_a_single_score(shape):
    loader = [(torch.tensor([[0.5], [-0.5], [0.1], [-0.1]]), torch.tensor([1, 0, 0, 1]).reshape(shape))]
    assert misc.accuracy(Echo(), loader, None, "cpu") == 0.5


# Arithmetic on weights


def test_pdb_stops_in_the_callers_frame(monkeypatch):
    frames = []
    monkeypatch.setattr("pdb.Pdb.set_trace", lambda self, frame: frames.append(frame.f_code.co_name))
    misc.pdb()
    assert frames == ["test_pdb_stops_in_the_callers_frame"]


@pytest.mark.parametrize("correct", [True, False])
def test_moving_average_is_the_sum_over_the_past(correct):
    average = misc.MovingAverage(0.9, oneminusema_correction=correct)
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]), torch.tensor([0.5, 0.0], requires_grad=True)]
    for value in values:
        result = average.update({"a": value})["a"]
    factor = 1.0 if correct else 0.1  # (1 - ema), divided out by the correction
    expected = factor * (0.81 * values[0] + 0.9 * values[1] + values[2])
    torch.testing.assert_close(result, expected.reshape(1, 2))
    result.sum().backward()
    torch.testing.assert_close(values[2].grad, torch.full((2,), factor))
    assert not average.ema_data["a"].requires_grad


def test_param_dict_moves_towards_other_weights():
    a = misc.ParamDict(w=torch.tensor([1.0, 2.0]), b=torch.tensor(3.0))
    b = misc.ParamDict(w=torch.tensor([5.0, 0.0]), b=torch.tensor(1.0))
    moved = a + 0.5 * (b - a)
    assert isinstance(moved, misc.ParamDict)
    assert list(moved) == ["w", "b"]
    assert moved["w"].tolist() == [3.0, 1.0]
    assert moved["b"].item() == 2.0
    assert a["w"].tolist() == [1.0, 2.0]


def test_param_dict_with_numbers():
    a = misc.ParamDict(w=torch.tensor([1.0, 4.0]))
    for result, expected in (
        (1 - a, [0.0, -3.0]), (1 + a, [2.0, 5.0]), (a / 2, [0.5, 2.0]), (a * a, [1.0, 16.0]), (-a, [-1.0, -4.0]),
    ):  # fmt: skip
        assert result["w"].tolist() == expected


def test_param_dict_names_what_does_not_match():
    with pytest.raises(KeyError, match="bias"):
        misc.ParamDict(w=1.0) + {"w": 1.0, "bias": 2.0}


def test_l2_between_dicts_is_the_mean_over_elements():
    a = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([0.0])}
    b = {"b": torch.tensor([3.0]), "w": torch.tensor([[1.0, 0.0]])}
    assert misc.l2_between_dicts(a, b).item() == pytest.approx((0 + 4 + 9) / 3)


def networks_apart(difference):
    h, moved = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        for p, q in zip(h.parameters(), moved.parameters(), strict=True):
            q.copy_(p + difference[: p.numel()].reshape(p.shape))
            difference = difference[p.numel() :]
    return h, moved


def test_distance_is_euclidean():
    h, moved = networks_apart(torch.tensor([2.0, 3.0, 6.0]))
    assert misc.distance(h, moved).item() == pytest.approx(7.0, rel=1e-5)


@pytest.mark.parametrize("delta", [0.5, 3.5, 7.5])
def test_proj_is_the_nearest_point_of_the_ball(delta):
    difference = torch.tensor([2.0, 3.0, 6.0])
    h, moved = networks_apart(difference)
    center = nn.utils.parameters_to_vector(h.parameters()).detach().clone()
    assert misc.proj(delta, moved, h) is moved
    expected = center + difference * min(1, delta / math.hypot(2, 3, 6))
    torch.testing.assert_close(nn.utils.parameters_to_vector(moved.parameters()).detach(), expected)
    torch.testing.assert_close(nn.utils.parameters_to_vector(h.parameters()).detach(), center)


def test_split_leaves_the_global_generators_alone():
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    misc.split_dataset(range(9), 3)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())
