"""Loaders by what they draw; worker processes only where a test is about them."""

import itertools
import os

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from domainbed.lib import fast_data_loader
from domainbed.lib.fast_data_loader import FastDataLoader, InfiniteDataLoader, InfiniteDataLoaderWithoutReplacement
from domainbed.lib.misc import split_dataset


class Numbers(Dataset):
    """0 to size - 1, each with the process that read it."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return torch.tensor(i), os.getpid()


def draws(loader, steps):
    return [x.tolist() for x, _ in itertools.islice(loader, steps)]


def loaders(**changes):
    return {"dataset": Numbers(10), "weights": None, "batch_size": 4, "num_workers": 0} | changes


def test_with_replacement_gives_full_minibatches_for_ever():
    torch.manual_seed(0)
    batches = draws(InfiniteDataLoader(**loaders()), 300)
    assert {len(batch) for batch in batches} == {4}
    assert any(len(set(batch)) < 4 for batch in batches)
    counts = torch.bincount(torch.tensor(batches).flatten(), minlength=10)
    assert 80 < counts.min() <= counts.max() < 160  # 120 each; sd about 10


def test_equal_seeds_give_equal_draws():
    def seeded(seed):
        torch.manual_seed(seed)
        return draws(InfiniteDataLoader(**loaders()), 5)

    assert seeded(0) == seeded(0) != seeded(1)


def test_draws_are_those_of_torchs_random_sampler():
    """DomainBed's rule: passes of len(dataset) draws, a new generator for each, what is left over dropped."""
    torch.manual_seed(3)
    batches = draws(InfiniteDataLoader(**loaders()), 4)
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()  # the loader seeds its workers
    expected = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        expected += torch.randint(10, (10,), generator=generator).tolist()[:8]
    assert list(itertools.chain(*batches)) == expected


def test_weights_steer_the_draws():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0] + [0.0] * 6)
    drawn = torch.tensor(draws(InfiniteDataLoader(**loaders(weights=weights)), 200)).flatten()
    assert set(drawn.tolist()) == {1, 3}
    assert 0.65 < (drawn == 3).float().mean() < 0.85


@pytest.mark.parametrize("weights", [None, torch.ones(3)])
def test_a_minibatch_larger_than_the_dataset_is_drawn_with_replacement(weights):
    loader = InfiniteDataLoader(**loaders(dataset=Numbers(3), weights=weights, batch_size=8))
    assert [len(batch) for batch in draws(loader, 3)] == [8, 8, 8]


def test_without_replacement_no_example_comes_twice_in_a_pass():
    batches = draws(InfiniteDataLoaderWithoutReplacement(**loaders()), 20)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert len({*first, *second}) == 8  # two of ten are dropped at the end of a pass
    assert {*itertools.chain(*batches)} == set(range(10))


def test_without_replacement_by_weight_has_no_repeats_in_a_minibatch():
    weights = torch.tensor([1.0] * 5 + [0.0] * 5)
    for batch in draws(InfiniteDataLoaderWithoutReplacement(**loaders(weights=weights)), 20):
        assert len(set(batch)) == 4
        assert max(batch) < 5


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        (InfiniteDataLoader, 0, "0 examples"),
        (InfiniteDataLoaderWithoutReplacement, 3, "minibatch of 4 .* 3 examples without replacement"),
    ],
)
def test_impossible_minibatches_are_refused_at_once(kind, size, message):
    with pytest.raises(ValueError, match=message):
        kind(**loaders(dataset=Numbers(size)))


def test_an_endless_loader_has_no_length():
    with pytest.raises(ValueError, match="endless"):
        len(InfiniteDataLoader(**loaders()))


def test_fast_loader_makes_one_shuffled_pass_each_time():
    loader = FastDataLoader(dataset=Numbers(50), batch_size=8, num_workers=0)
    passes = [list(itertools.chain(*draws(loader, None))) for _ in range(2)]
    assert [sorted(p) for p in passes] == [list(range(50))] * 2
    assert len({tuple(p) for p in passes} | {tuple(range(50))}) == 3
    assert len(loader) == 7


def test_fast_loader_starts_afresh_after_an_abandoned_pass():
    loader = FastDataLoader(dataset=Numbers(9), batch_size=2, num_workers=0)
    draws(loader, 2)
    assert sorted(itertools.chain(*draws(loader, None))) == list(range(9))


def test_fast_loader_keeps_its_worker_between_passes():
    loader = FastDataLoader(dataset=Numbers(6), batch_size=3, num_workers=1)
    readers = {pid for _ in range(2) for _, pids in loader for pid in pids.tolist()}
    assert len(readers) == 1
    assert os.getpid() not in readers


def test_workers_are_capped_and_tensors_need_none(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    tensors = TensorDataset(torch.arange(10), torch.arange(10))
    nested = split_dataset(split_dataset(tensors, 8)[0], 4)[1]
    assert fast_data_loader._num_workers(Numbers(3), 8) == 3
    assert fast_data_loader._num_workers(Numbers(3), 2) == 2
    assert fast_data_loader._num_workers(tensors, 8) == 0
    assert fast_data_loader._num_workers(nested, 8) == 0
    assert FastDataLoader(nested, batch_size=2, num_workers=8).num_workers == 0
