"""Objects whose state goes through a file into an object that was built afresh."""

import copy
import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from domainbed.state_trees import NotResumable, capture, restore

Pair = namedtuple("Pair", "a b")


def through_a_file(value: Any, fresh: Any, tmp_path: Path) -> Any:
    """What ``fresh`` becomes; the file is read as a stranger's would be."""
    torch.save(capture(value, "it"), tmp_path / "tree")
    return restore(torch.load(tmp_path / "tree", weights_only=True), fresh, "it")


class Helper:
    def __init__(self, owner: Any):
        self.owner, self.count, self.seen = owner, 0, []


class Learner(nn.Module):
    """Of everything that algorithms out there hang on themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.first = self.network[0]
        self.unregistered = [nn.Linear(2, 2)]
        self.parameters_again = list(self.network.parameters())
        self.register_buffer("q", torch.Tensor())  # grows at the first update, as DomainBed's GroupDRO's
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.1)
        self.inner = torch.optim.SGD(self.unregistered[0].parameters(), lr=0.1, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        self.queue: deque[torch.Tensor] = deque(maxlen=3)
        self.counts: Any = defaultdict(int)
        self.rng, self.old_rng = np.random.default_rng(1), np.random.RandomState(2)
        self.python_rng, self.torch_rng = random.Random(3), torch.Generator().manual_seed(4)
        self.helper = Helper(self)
        self.history: dict[Any, Any] = {}
        self.same_history = self.history
        self.best = None
        self.function = functools.partial(torch.clamp, min=0)

    def update(self) -> float:
        x = torch.randn(8, 3) + float(self.rng.normal() + self.old_rng.normal() + self.python_rng.random())
        x += torch.rand(8, 3, generator=self.torch_rng)
        if not len(self.q):
            self.q = torch.ones(2)
        losses = self.network(x).pow(2).mean(0)
        self.q = (self.q * losses.detach().exp()).softmax(0)
        self.queue.append(losses.detach())
        loss = (self.q * losses).sum() + self.unregistered[0](torch.stack([*self.queue])).abs().mean()
        self.helper.count += 1
        self.helper.seen.append(self.helper.count)
        self.history[self.helper.count, "step"] = np.float32(loss.item())
        self.counts["even" if self.helper.count % 2 == 0 else "odd"] += 1
        if self.helper.count % 2:  # gradients pile up over two updates
            self.optimizer.zero_grad()
            self.inner.zero_grad()
        loss.backward()
        if self.helper.count % 2 == 0:
            self.optimizer.step()
            self.inner.step()
            self.schedule.step()
        if self.best is None or loss.item() < self.best[0]:
            self.best = (loss.item(), Pair(1, [2.5]))
        return loss.item()


@pytest.mark.parametrize("updates", [0, 1, 2, 5])
def test_it_goes_on_as_if_nothing_had_happened(tmp_path: Path, updates: int) -> None:
    torch.manual_seed(0)
    learner = Learner()
    for _ in range(updates):
        learner.update()
    if updates:  # a named tuple is made by its own class only
        learner.best = learner.best[0], 1
    state = torch.get_rng_state()
    torch.save(capture(learner, "learner"), tmp_path / "tree")
    uninterrupted = [learner.update() for _ in range(6)]

    torch.manual_seed(99)
    fresh = restore(torch.load(tmp_path / "tree", weights_only=True), Learner(), "learner")
    torch.set_rng_state(state)
    assert [fresh.update() for _ in range(6)] == uninterrupted
    pairs = zip(learner.state_dict().values(), fresh.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert fresh.first is fresh.network[0]
    assert fresh.helper.owner is fresh
    assert fresh.same_history is fresh.history
    assert fresh.history == learner.history
    assert fresh.counts == learner.counts
    assert fresh.parameters_again[0] is fresh.first.weight
    assert fresh.queue.maxlen == 3
    assert fresh.schedule.get_last_lr() == learner.schedule.get_last_lr()


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 2**200, -1.5, float("inf"), "text", [1, [2.0, None]], (1, ("a",)), {1, 2},
        {"a": {2: [3]}, (1, 2): 4}, OrderedDict(b=1, a=2), {}, [], (), Path("a"), torch.float32, torch.Size([2]),
        torch.device("cpu"), b"\xff", 1 + 2j, range(1, 9, 2), np.dtype("f4"), frozenset({1, 2}),
        deque([1, 2, 3], maxlen=3),
    ],
)  # fmt: skip
def test_plain_values_need_nothing_to_be_poured_into(tmp_path: Path, value: Any) -> None:
    found = through_a_file(value, None, tmp_path)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        np.array(3),
        np.array([], dtype=np.int16),
        np.uint32(7),
        np.float64(0.1),
        np.bool_(1),
    ],
)
def test_numpy(tmp_path: Path, value: Any) -> None:
    found = through_a_file(value, None, tmp_path)
    assert type(found) is type(value)
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert np.array_equal(found, value)


def test_containers_that_are_there_are_filled_and_not_replaced(tmp_path: Path) -> None:
    fresh: Any = [[0], {"a": torch.zeros(1), "c": 1}, Counter(), deque(maxlen=2)]
    value: Any = [[1, 2], {"b": 2, "a": torch.ones(1)}, Counter("aab"), deque([1], maxlen=2)]
    parts = copy.copy(fresh)
    found = through_a_file(value, fresh, tmp_path)
    assert found is fresh
    assert all(a is b for a, b in zip(found, parts, strict=True))
    assert str(found) == str(value)


def test_named_tuples(tmp_path: Path) -> None:
    assert through_a_file([Pair(1, [2])], [Pair(0, [])], tmp_path) == [Pair(1, [2])]


class Slotted:
    __slots__ = ("value",)


class Level(int):
    pass


class HalfSlotted(Slotted):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Level(3),
        HalfSlotted(),
        np.longdouble(1),
        iter([1]),
        (i for i in range(3)),
        Slotted(),
        np.array(["a"]),
        nn.LazyLinear(2),
    ],
)
def test_what_cannot_be_kept_is_said(value: Any) -> None:
    with pytest.raises(NotResumable, match=r"algorithm\.there"):
        capture({"there": value}["there"], "algorithm.there")


@pytest.mark.parametrize(
    ("value", "fresh"),
    [
        (nn.Linear(2, 3), nn.Linear(3, 2)),
        (nn.Linear(2, 3), nn.Conv2d(1, 1, 1)),
        (torch.optim.Adam([torch.ones(1)]), torch.optim.SGD([torch.ones(1)])),
        (torch.relu, torch.sigmoid),
        (random.Random(), np.random.RandomState()),
        (Helper(1), None),
        (Counter("a"), None),
        (nn.Linear(1, 1), None),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, value: Any, fresh: Any) -> None:
    with pytest.raises(NotResumable, match="it"):
        through_a_file(value, fresh, tmp_path)


def test_requires_grad_and_missing_gradients(tmp_path: Path) -> None:
    layer, fresh = nn.Linear(1, 1), nn.Linear(1, 1)
    layer.weight.requires_grad_(False)
    layer.bias.grad = torch.tensor([2.0])
    fresh.weight.grad = torch.tensor([[7.0]])
    through_a_file(layer, fresh, tmp_path)
    assert not fresh.weight.requires_grad
    assert fresh.weight.grad is None
    assert fresh.bias.grad == 2


def test_modes_of_modules(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    network[1].eval()
    fresh = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    through_a_file(network, fresh, tmp_path)
    assert [module.training for module in fresh.modules()] == [True, True, False]


class Foreign(nn.Module):
    """A network, an optimizer, and what its subclass does to them."""

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = nn.Linear(3, 2)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.network.parameters(), lr=0.1)
        self.count = 0

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).pow(2).mean()

    def change(self) -> None:
        """Comes after each update."""

    def update(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(torch.randn(4, 3))
        loss.backward()
        self.optimizer.step()
        self.count += 1
        self.change()
        return loss.item()


class TwoPhase(Foreign):
    """Trains another network from its third update on, as JTT does."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 2)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).pow(2).mean() + self.other(x).pow(4).mean()

    def change(self) -> None:
        if self.count == 2:
            self.optimizer = torch.optim.Adam(self.other.parameters(), lr=0.05)


class AddsGroup(TwoPhase):
    def change(self) -> None:
        if self.count == 2:
            self.optimizer.add_param_group({"params": self.other.parameters(), "lr": 0.2})


class Wrapped(torch.optim.Optimizer):
    """Leaves what counts to another optimizer, which its own state_dict doesn't know of, as SAM's usual one does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.Adam(self.param_groups, lr=0.1)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:
        self.base.step()


class UsesWrapped(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = Wrapped(self.network.parameters())


class Untied(Foreign):
    """What the constructor ties, the run unties, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.best = self.network.state_dict()
        self.q = self.old_q = torch.ones(2)
        self.anchor: list[torch.Tensor] = []

    def change(self) -> None:
        self.best = copy.deepcopy(self.best)
        self.old_q, self.q = self.q, self.q * 1.5
        self.anchor = [parameter.data for parameter in self.network.parameters()]
        with torch.no_grad():
            self.anchor[0] += self.best["weight"] * 0.1 + self.old_q.sum()


class Phase(Enum):
    WARM = 1
    MAIN = 2


def counter() -> Any:
    number = 0

    def count() -> int:
        nonlocal number
        number += 1
        return number

    return count


class Replay(list):
    """A buffer that knows its place."""

    position = 0

    def put(self, value: int) -> None:
        self.append(value)
        self.position = (self.position + 1) % 3


class Moves(Foreign):
    """Attributes that come, go and change their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.warm, self.phase = True, Phase.WARM
        self.device: torch.device | None = None
        self.leaf = torch.zeros(2, requires_grad=True)
        self.ages, self.power = frozenset([0]), functools.partial(torch.pow, exponent=2)
        self.queues: dict[str, Any] = {}
        self.replay = Replay()
        self.next_number = counter()

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        factor = 2 if hasattr(self, "warm") else 1
        queue = sum(sum(queue) for queue in self.queues.values())
        return (
            self.power(self.network(x)).mean() * factor
            + (self.leaf * (len(self.ages) + queue + self.replay.position)).sum()
        )

    def change(self) -> None:
        self.device, self.phase = torch.device("cpu"), Phase.MAIN
        self.replay.put(self.count)
        self.ages |= {self.next_number()}
        self.power = functools.partial(torch.pow, exponent=self.count + 2)
        self.queues.setdefault("a", deque(maxlen=2)).append(self.count)
        if self.count == 2:
            del self.warm
            self.register_buffer("late", torch.ones(1), persistent=False)
        if self.count % 2 == 0:  # its gradient piles up over two updates
            with torch.no_grad():
                self.leaf -= 0.1 * (self.leaf.grad if self.leaf.grad is not None else 0)
            self.leaf.grad = None


class Layout(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten())
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.reshape(1, 2, 2, 3)).pow(2).mean()

    def change(self) -> None:
        self.network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("updates", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [Foreign, TwoPhase, AddsGroup, UsesWrapped, Untied, Moves, Layout])
def test_what_classes_out_there_do_to_themselves(tmp_path: Path, kind: type[Foreign], updates: int) -> None:
    torch.manual_seed(0)
    whole = kind()
    for _ in range(updates):
        whole.update()
    state = torch.get_rng_state()
    torch.save(capture(whole, "it"), tmp_path / "tree")
    uninterrupted = [whole.update() for _ in range(4)]

    torch.manual_seed(9)
    fresh = restore(torch.load(tmp_path / "tree", weights_only=True), kind(), "it")
    torch.set_rng_state(state)
    assert [fresh.update() for _ in range(4)] == uninterrupted
    ours, theirs = fresh.state_dict(), whole.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert vars(fresh).keys() == vars(whole).keys()


class MakesNetwork(Foreign):
    """As DomainBed's Fish; its constructor doesn't make it."""

    def change(self) -> None:
        self.inner = copy.deepcopy(self.network)


class Half(Foreign):
    def change(self) -> None:
        self.network.half()


class Spawns(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)

    def change(self) -> None:
        self.rng.spawn(1)


@pytest.mark.parametrize("kind", [MakesNetwork, Half, Spawns])
def test_what_can_be_neither_changed_nor_made_is_refused(tmp_path: Path, kind: type[Foreign]) -> None:
    whole = kind()
    whole.update()
    with pytest.raises(NotResumable, match=r"it|spawned"):
        through_a_file(whole, kind(), tmp_path)
