import numpy as np
import pytest
import torch
from torch import nn

from domainbed import records
from domainbed.datasets.base import InMemoryEnvironment, Split
from domainbed.evaluation import Accuracy, autocast, evaluate, measure, predictions

CPU = torch.device("cpu")


class Reader(nn.Module):
    """Predicts the number that is written into the image."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        value = x[:, 0, 0, 0]
        if self.columns == 1:
            return value[:, None] - 0.5
        return nn.functional.one_hot(value.long(), self.columns).float()


def environment(written: list[int], y: list[int], c: list[int]) -> InMemoryEnvironment:
    return InMemoryEnvironment(torch.tensor(written).float().view(-1, 1, 1, 1), torch.tensor(y), torch.tensor(c))


def test_measure_of_a_hand_made_case() -> None:
    accuracy = measure(np.array([True, False, True, True, False]), np.array([0, 0, 3, 3, 5]))
    assert accuracy == Accuracy(0.6, {0: 0.5, 3: 1.0, 5: 0.0}, {0: 2, 3: 2, 5: 1})
    assert (accuracy.worst, accuracy.worst_group) == (0.0, 5)


def test_ties_go_to_the_smallest_group() -> None:
    assert measure(np.array([False, False]), np.array([4, 2])).worst_group == 2


def test_measure_agrees_with_a_loop_over_examples() -> None:
    rng = np.random.default_rng(0)
    correct, groups = rng.random(500) < 0.7, rng.integers(0, 9, 500)
    found = measure(correct, groups)
    for g in range(9):
        members = [bool(ok) for ok, group in zip(correct, groups, strict=True) if group == g]
        assert found.groups[g] == pytest.approx(sum(members) / len(members))
        assert found.counts[g] == len(members)
    assert found.average == pytest.approx(sum(map(bool, correct)) / 500)
    assert found.worst == min(found.groups.values())


@pytest.mark.parametrize("columns", [1, 2])
def test_splits_of_an_environment_are_measured_apart(columns: int) -> None:
    env = environment([0, 1, 1, 0, 1, 0], y=[0, 1, 0, 0, 1, 1], c=[0, 0, 1, 1, 1, 0])
    splits = [Split(4, "in", env, np.array([0, 1, 2]), 4), Split(4, "out", env, np.array([5, 4, 3]), 4)]
    found = evaluate(Reader(columns), splits, 2, CPU)
    assert found[4, "in"] == Accuracy(2 / 3, {0: 1.0, 1: 0.0, 2: 1.0}, {0: 1, 1: 1, 2: 1})
    assert found[4, "out"] == Accuracy(2 / 3, {1: 1.0, 2: 0.0, 3: 1.0}, {1: 1, 2: 1, 3: 1})


def test_no_confounder_no_groups() -> None:
    env = environment([0, 1], [0, 0], [0, 0])
    found = evaluate(Reader(2), [Split(0, "in", env, np.arange(2), 0)], 1, CPU)
    assert found[0, "in"] == Accuracy(0.5, {}, {})
    assert records.accuracies(found, 2) == {"env0_in_acc": 0.5}


def test_the_algorithm_is_left_in_training_mode() -> None:
    reader = Reader(2)
    predictions(reader, environment([0], [0], [0]), np.array([0]), CPU)
    assert reader.training


def test_record_keys() -> None:
    found = {(1, "out"): Accuracy(0.6, {0: 0.5, 3: 0.25}, {0: 2, 3: 4})}
    assert records.accuracies(found, num_groups=4) == {
        "env1_out_acc": 0.6, "env1_out_wga": 0.25,
        "env1_out_g0_acc": 0.5, "env1_out_g0_n": 2, "env1_out_g3_acc": 0.25, "env1_out_g3_n": 4,
    }  # fmt: skip
    assert records.accuracies(found, num_groups=65) == {
        "env1_out_acc": 0.6, "env1_out_wga": 0.25, "env1_out_wga_g": 3, "env1_out_wga_n": 4,
    }  # fmt: skip


def test_bf16_is_autocast() -> None:
    a = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32
