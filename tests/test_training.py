import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from domainbed import training
from domainbed.algorithms.base import Task
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.loaders import Minibatch
from domainbed.splits import Split

CPU = torch.device("cpu")


class Counting(nn.Module):
    """Returns its step number, another key on odd steps, and predicts class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def update(self, minibatches, unlabeled=None):
        assert self.training
        self.calls += 1
        self.last = minibatches, unlabeled
        number = self.calls - 1
        return {"number": torch.tensor(float(number)), "odd" if number % 2 else "even": np.float32(number)}

    def predict(self, x):
        return torch.eye(2)[:1].expand(len(x), 2)


def plan(**options) -> training.Plan:
    environment = InMemoryEnvironment(torch.zeros(4, 1), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 0]))
    splits = [Split(0, "in", environment, np.arange(4), 0)]
    return training.Plan(**{"steps": 8, "checkpoint_freq": 3, "steps_per_epoch": 2.0, "splits": splits,
                            "num_classes": 2, "num_confounders": 2} | options)  # fmt: skip


def trained(*args, **options):
    """The records."""
    return [record for record in training.train(*args, **options) if record is not None]


def minibatches():
    return itertools.repeat([Minibatch(torch.zeros(2, 1), torch.zeros(2).long(), c=torch.zeros(2))])


def test_cadence_means_and_measurements() -> None:
    records = trained(Counting(), minibatches(), None, plan(), CPU)
    assert [r["step"] for r in records] == [0, 3, 6, 7]
    assert [r["epoch"] for r in records] == [0, 1.5, 3, 3.5]
    assert [r["number"] for r in records] == [0, 2, 5, 7]  # means over the steps since the last record
    assert records[0].keys() & {"odd", "even"} == {"even"}
    assert records[1]["odd"] == 2
    assert records[3]["odd"] == 7
    assert all(r["mem_gb"] == 0.0 and r["step_time"] > 0 for r in records)
    assert all(type(r["number"]) is float for r in records)
    last = {key: value for key, value in records[-1].items() if key.startswith("env")}
    assert last == {
        "env0_in_acc": 0.75, "env0_in_wga": 0.0, "env0_in_g0_acc": 1.0, "env0_in_g0_n": 1,
        "env0_in_g1_acc": 1.0, "env0_in_g1_n": 2, "env0_in_g2_acc": 0.0, "env0_in_g2_n": 1,
            "env0_in_group_mean_acc": 2 / 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "freq", "expected"), [(5001, 300, [*range(0, 4801, 300), 5000]), (1, 100, [0]), (7, 3, [0, 3, 6])]
)
def test_domainbeds_cadence(steps: int, freq: int, expected: list[int]) -> None:
    fast = plan(steps=steps, checkpoint_freq=freq, splits=[])
    assert [r["step"] for r in trained(Counting(), minibatches(), None, fast, CPU)] == expected


def test_what_update_gets() -> None:
    algorithm = Counting()
    unlabeled = itertools.repeat([torch.ones(3)])
    trained(algorithm, minibatches(), unlabeled, plan(steps=1), CPU)
    (minibatch,), (x,) = algorithm.last
    assert torch.equal(minibatch.c, torch.zeros(2))
    assert torch.equal(x, torch.ones(3))


def test_a_saved_model_is_domainbeds_and_loads_without_unpickling_code(tmp_path) -> None:
    network = nn.Linear(2, 3)
    task = Task((2,), 3, 1, 2, (4, 5, 6, 7, 8, 9))
    training.save_model(tmp_path / "model.pkl", network, task, {"lr": 1e-3}, {"seed": 0}, step=7)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pkl"]
    found = torch.load(tmp_path / "model.pkl", weights_only=True)
    shapes = {"model_input_shape", "model_num_classes", "model_num_domains"}
    assert found.keys() == shapes | {"args", "model_hparams", "model_dict", "task", "step"}
    assert Task.from_dict(found["task"]) == task
    assert torch.equal(found["model_dict"]["weight"], network.weight)


NAN = float("nan")


@pytest.mark.parametrize(
    ("patience", "min_delta", "scores", "ends"),
    [
        (2, 0.0, [0.5, 0.5, 0.5], 2),  # a tie is no rise
        (2, 0.0, [0.5, 0.4, 0.5, 0.9], 2),
        (2, 0.0, [0.5, 0.4, 0.6, 0.5, 0.6], 4),  # a rise starts the count again
        (1, 0.0, [0.1, 0.2, 0.3], None),
        (1, 0.1, [0.5, 0.55], 1),
        (3, 0.1, [0.5, 0.56, 0.62, 0.68, 0.74], None),  # .62 and .74 count: .12 above the last that did
        (3, 0.1, [0.5, 0.58, 0.59, 0.595], 3),
        (1, 0.25, [0.25, 0.5], 1),  # not above by more than min_delta
        (2, 0.0, [NAN, 0.2, NAN, 0.3, NAN, NAN], 5),
        (2, 0.0, [NAN, NAN], 1),
        (2, 0.0, [-1.0, -2.0, -0.5], None),
    ],
)
def test_when_training_is_over(patience, min_delta, scores, ends) -> None:
    stopping = training.EarlyStopping(patience, min_delta)
    over = [stopping.is_over(score, step) for step, score in enumerate(scores)]
    assert over == [position == ends for position in range(len(scores))]


def test_it_says_what_it_waited_for() -> None:
    stopping = training.EarlyStopping(2, 0.125)
    assert [stopping.is_over(score, step) for step, score in ((0, 0.25), (300, 0.5), (600, 0.55), (900, 0.4))][-1]
    assert str(stopping) == "2 checkpoints brought no validation score more than 0.125 above that of step 300 (0.5000)"


@pytest.mark.parametrize(("patience", "min_delta"), [(0, 0.0), (1, -0.1), (1, NAN)])
def test_numbers_that_make_no_sense_are_refused(patience, min_delta) -> None:
    with pytest.raises(ValueError, match=f"patience {patience} and min_delta {min_delta}"):
        training.EarlyStopping(patience, min_delta)


def test_wherever_it_pauses_a_copy_goes_on_alike() -> None:
    """Without random numbers, algorithm and progress are all that there is."""
    whole = trained(Counting(), minibatches(), None, plan(), CPU)
    algorithm, progress, records, pauses = Counting(), training.Progress(), [], []
    for record in training.train(algorithm, minibatches(), None, plan(), CPU, progress):
        records += [] if record is None else [record]
        pauses.append((copy.deepcopy(algorithm), copy.deepcopy(progress), len(records)))
    assert len(pauses) == 8 + 4 + 4  # updates, measured environments, records
    for copied, there, before in pauses:
        rest = trained(copied, minibatches(), None, plan(), CPU, progress=there)
        assert [without_time(r) for r in rest] == [without_time(r) for r in whole[before:]]
        assert copied.calls == 8


def without_time(record):
    return {key: value for key, value in record.items() if key != "step_time"}
