import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from domainbed.datasets.base import (
    InMemoryEnvironment,
    MultipleDomainDataset,
    confounders,
    selection_splits,
    split_environments,
    training_splits,
    validation_splits,
)
from domainbed.lib.misc import labels


class Four(MultipleDomainDataset):
    ENVIRONMENTS = ("a", "b", "c", "d")
    CONFOUNDERS = ("one", "two", "three")

    def __init__(self, sizes=(50, 40, 30, 20), units=None):
        self.input_shape, self.num_classes = (1, 2, 2), 2
        self.datasets = [
            InMemoryEnvironment(torch.zeros(n, 1, 2, 2), torch.arange(n) % 2, torch.arange(n) % 3, units and units(n))
            for n in sizes
        ]


class Official(Four):
    VALIDATION_ENVS = (2,)
    TEST_ENVS = (3,)


def domainbed_split(length: int, n: int, trial_seed: int, e: int) -> tuple[list[int], list[int]]:
    """DomainBed's rule, from its description."""
    seed = int(hashlib.md5(str((trial_seed, e)).encode()).hexdigest(), 16) % 2**31
    keys = list(range(length))
    np.random.RandomState(seed).shuffle(keys)
    return keys[:n], keys[n:]


@pytest.mark.parametrize("trial_seed", [0, 1, 2])
def test_splits_are_domainbeds(trial_seed: int) -> None:
    splits = split_environments(Four(), [1], 0.2, 0.5, trial_seed)
    found = {(split.env, split.kind): split.keys.tolist() for split in splits}
    for e, length in enumerate((50, 40, 30, 20)):
        out, rest = domainbed_split(length, int(length * 0.2), trial_seed, e)
        if e == 1:
            order, remaining = domainbed_split(len(rest), len(rest) // 2, trial_seed, e)
            assert found[e, "uda"] == [rest[k] for k in order]
            rest = [rest[k] for k in remaining]
        assert found[e, "out"] == out
        assert found[e, "in"] == rest
    assert [(s.env, s.kind) for s in splits] == [
        *((e, "in") for e in range(4)),
        *((e, "out") for e in range(4)),
        (1, "uda"),
    ]
    assert splits[-1].number == 0  # DomainBed counts uda-splits


def test_empty_splits_are_left_out() -> None:
    assert [split.kind for split in split_environments(Four(), [0], 0.0)] == ["in"] * 4


def test_units_never_part() -> None:
    dataset = Four(units=lambda n: torch.arange(n) // 5)
    for split_seed in range(5):
        units: dict[int, list[set[int]]] = {}
        for split in split_environments(dataset, [0], 0.2, 0.5, split_seed):
            units.setdefault(split.env, []).append({int(key) // 5 for key in split.keys})
        for several in units.values():
            assert sum(map(len, several)) == len(set.union(*several))


def test_official_validation_environments_are_whole_and_not_trained_on() -> None:
    dataset = Official()
    splits = split_environments(dataset, [3], 0.2)
    assert [(s.env, s.kind, len(s)) for s in splits] == [(0, "in", 50), (1, "in", 40), (2, "in", 30), (3, "in", 20)]
    assert [s.env for s in training_splits(dataset, splits, [3])] == [0, 1]
    assert [(s.env, s.kind) for s in validation_splits(dataset, splits, [3])] == [(2, "in")]
    assert [s.env for s in selection_splits(dataset, splits, [3])] == [2, 3]


def test_roles_of_splits() -> None:
    dataset, test_envs = Four(), [1, 2]
    splits = split_environments(dataset, test_envs, 0.2)
    assert [(s.env, s.kind) for s in training_splits(dataset, splits, test_envs)] == [(0, "in"), (3, "in")]
    assert [(s.env, s.kind) for s in validation_splits(dataset, splits, test_envs)] == [(0, "out"), (3, "out")]
    kept = [(s.env, s.kind) for s in selection_splits(dataset, splits, test_envs)]
    assert kept == [(1, "in"), (2, "in"), (0, "out"), (1, "out"), (2, "out"), (3, "out")]


@pytest.mark.parametrize(
    ("dataset", "test_envs", "message"),
    [
        (Four(), [4], r"--test_envs 4: Four has the test environments \[0, 1, 2, 3\]"),
        (Four(), [-1], r"--test_envs -1"),
        (Four(), [0, 1, 2, 3], "leaves no environment of Four to train on"),
        (Official(), [2], r"--test_envs 2: Official has the test environments \[0, 1, 3\]"),
        (Official(), [0], r"--test_envs must contain \[3\], the official test set of Official"),
    ],
)
def test_impossible_test_environments(dataset: Four, test_envs: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_environments(dataset, test_envs, 0.2)


def test_bytes_become_fractions() -> None:
    env = InMemoryEnvironment(
        torch.tensor([[[[51]]], [[[255]]]], dtype=torch.uint8), torch.tensor([0, 1]), torch.zeros(2)
    )
    x, y = env[1]
    assert (x.item(), y.item(), x.dtype, y.dtype) == (1.0, 1, torch.float32, torch.int64)
    assert env[torch.tensor([0, 1])][0].flatten().tolist() == pytest.approx([0.2, 1.0])


class OneByOne:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[None, int]:
        return None, 2 * i


class WithTargets(OneByOne):
    targets = (4, 5, 6)


def test_labels_of_any_dataset() -> None:
    tensors = TensorDataset(torch.zeros(2), torch.tensor([8, 9]))
    assert labels(OneByOne()).tolist() == [0, 2, 4]
    assert labels(WithTargets()).tolist() == [4, 5, 6]
    assert labels(ConcatDataset([tensors, tensors])).tolist() == [8, 9, 8, 9]
    assert confounders(OneByOne()).tolist() == [0, 0, 0]


def test_arrays_of_composed_datasets() -> None:
    part = Four().datasets[0]
    assert confounders(ConcatDataset([part, part])).tolist() == [*part.c, *part.c]
    assert confounders(Subset(part, [3, 1])).tolist() == [0, 1]
    assert labels(Subset(part, [3, 2])).tolist() == [1, 0]


def test_a_confounder_that_an_environment_lacks_is_not_known() -> None:
    dataset = Four()
    dataset.datasets[2] = TensorDataset(torch.zeros(30, 1, 2, 2), torch.zeros(30).long())
    assert dataset.num_confounders == 1


def test_domainbeds_protocol_of_a_dataset() -> None:
    dataset = Four()
    assert len(dataset) == 4
    assert dataset[2] is dataset.datasets[2]
    assert list(dataset) == dataset.datasets
    assert dataset.num_confounders == 3
