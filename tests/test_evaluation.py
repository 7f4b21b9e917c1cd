import numpy as np
import pytest
import torch
from torch import nn

from domainbed import records
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.evaluation import Accuracy, autocast, evaluate, measure, predictions
from domainbed.splits import Split

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


def test_groups_of_a_budget_are_the_annotated_ones() -> None:
    env = environment([0, 1, 1, 0, 1, 0], y=[0, 1, 0, 0, 1, 1], c=[0, 0, 1, 1, 1, 0])
    hidden, known = np.array([False] * 2), np.array([True, False, True])
    splits = [
        Split(1, "in", env, np.array([5]), 1),
        Split(1, "out", env, np.array([0, 1, 2]), 1, annotated=known, inferred=np.array([1, 1, 0])),
        Split(1, "uda", env, np.array([3, 4]), 0, annotated=hidden),
    ]
    found = evaluate(Reader(2), splits, 2, CPU)
    assert found[1, "in"] == Accuracy(0.0, {2: 0.0}, {2: 1})
    assert found[1, "out"] == Accuracy(2 / 3, {0: 1.0, 1: 0.0}, {0: 1, 1: 1}, 3)  # by the true confounders
    assert found[0, "uda"] == Accuracy(1.0, {}, {}, 2)
    assert records.accuracies(found, 4, (1, 1, 0, 0)) == {
        "env1_in_acc": 0.0, "env1_in_wga": 0.0, "env1_in_group_mean_acc": 0.0, "env1_in_g2_acc": 0.0, "env1_in_g2_n": 1,
        "env1_out_acc": 2 / 3, "env1_out_n": 3, "env1_out_wga": 0.0, "env1_out_group_mean_acc": 0.5,
        "env1_out_adj_acc": 0.5, "env1_out_g0_acc": 1.0, "env1_out_g0_n": 1, "env1_out_g1_acc": 0.0, "env1_out_g1_n": 1,
        "env0_uda_acc": 1.0, "env0_uda_n": 2, "train_g0_n": 1, "train_g1_n": 1,
    }  # fmt: skip
    assert records.accuracies({(1, "out"): found[1, "out"]}, 65).keys() == {
        "env1_out_acc", "env1_out_n", "env1_out_wga", "env1_out_group_mean_acc", "env1_out_wga_g", "env1_out_wga_n",
    }  # fmt: skip


def test_a_budget_that_reaches_every_image_changes_no_accuracy() -> None:
    correct, groups = np.array([True, False, True]), np.array([0, 0, 3])
    whole, granted = measure(correct, groups), measure(correct, groups, np.ones(3, dtype=bool))
    assert (granted.average, granted.groups, granted.counts) == (whole.average, whole.groups, whole.counts)
    assert (whole.images, granted.images) == (None, 3)


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
        "env1_out_acc": 0.6, "env1_out_wga": 0.25, "env1_out_group_mean_acc": 0.375,
        "env1_out_g0_acc": 0.5, "env1_out_g0_n": 2, "env1_out_g3_acc": 0.25, "env1_out_g3_n": 4,
    }  # fmt: skip
    assert records.accuracies(found, num_groups=65) == {
        "env1_out_acc": 0.6, "env1_out_wga": 0.25, "env1_out_group_mean_acc": 0.375, "env1_out_wga_g": 3,
        "env1_out_wga_n": 4,
    }  # fmt: skip


def test_record_keys_with_the_training_counts() -> None:
    found = {(1, "out"): Accuracy(0.6, {0: 0.5, 3: 0.25}, {0: 2, 3: 4}), (2, "in"): Accuracy(0.5, {0: 0.5}, {0: 2})}
    plain, adjusted = (
        records.accuracies(found, 4),
        {"env1_out_adj_acc": (3 * 0.5 + 0.25) / 4},
    )  # of group 3 none in env2
    assert records.accuracies(found, 4, (30, 0, 0, 10)) == plain | adjusted | {"train_g0_n": 30, "train_g3_n": 10}
    many = (30, 0, 0, 10, *[0] * 61)
    assert records.accuracies(found, 65, many) == records.accuracies(found, 65) | adjusted


def test_adjusted_accuracy_agrees_with_a_loop_over_examples() -> None:
    rng = np.random.default_rng(1)
    written, y, c = (rng.integers(0, high, 300).tolist() for high in (3, 3, 2))
    training = rng.choice(6, 200, p=[0.4, 0.1, 0.02, 0.08, 0.3, 0.1]).tolist()
    split = Split(0, "in", environment(written, y, c), np.arange(300), 0)
    counts = [training.count(g) for g in range(6)]

    record = records.accuracies(evaluate(Reader(3), [split], 2, CPU), 6, counts)

    groups = [2 * label + confounder for label, confounder in zip(y, c, strict=True)]
    expected = 0.0
    for w, label, g in zip(written, y, groups, strict=True):  # each example as often as its group is in training
        expected += (w == label) * (training.count(g) / len(training)) / groups.count(g)
    assert record["env0_in_adj_acc"] == pytest.approx(expected)
    assert record["env0_in_adj_acc"] != pytest.approx(record["env0_in_acc"], abs=0.001)
    assert [record[f"train_g{g}_n"] for g in range(6)] == counts


def test_without_groups_nothing_is_adjusted() -> None:
    assert records.accuracies({(0, "in"): Accuracy(0.5, {}, {})}, 2, (3, 4)) == {"env0_in_acc": 0.5}


def test_a_step_within_the_context_counts() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with autocast(CPU, "bf16"):
        layer(x).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
        after = layer(x)
    with autocast(CPU, "bf16"):
        assert torch.equal(layer(x), after)


def test_bf16_is_autocast() -> None:
    a = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32
