"""Pseudo-confounders: each method on hand-made features, the whole way on a small set, what it must leave alone."""

import dataclasses
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from domainbed import inferred_confounders
from domainbed.datasets.base import InMemoryEnvironment
from domainbed.hparams_registry import default_hparams
from domainbed.inferred_confounders import REGISTRY, Inferred, Seen, Setting, agreement, clusters, infer, read, write
from domainbed.splits import Split

HPARAMS = default_hparams("ERM", "DigitsM2M") | {"backbone": "small_cnn", "batch_size": 16, "lr": 0.003}


def seen(features=None, logits=None, y=None) -> Seen:
    n = len(next(a for a in (features, logits, y) if a is not None))
    blank = np.zeros((n, 2))
    given = [blank if a is None else np.asarray(a) for a in (features, logits)]
    return Seen(*(a.astype(np.float32) for a in given), np.zeros(n, np.int64) if y is None else np.asarray(y))


def blobs(centres, n: int = 30, spread: float = 0.1):
    """(n * centres, D) points, and the number of the centre of each."""
    centres = np.asarray(centres, dtype=float)
    number = np.repeat(np.arange(len(centres)), n)
    return centres[number] + np.random.default_rng(0).normal(scale=spread, size=(len(number), centres.shape[1])), number


def same_parts(a, b) -> bool:
    """Whether two arrays divide the images alike, whatever the names."""
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


class TestClusters:
    def test_the_number_of_clusters_is_that_of_the_highest_silhouette(self):
        x, number = blobs([(0, 0), (5, 0), (0, 5), (5, 5)])
        assert same_parts(clusters(x, 0), number)

    @pytest.mark.parametrize("x", [np.ones((20, 3)), np.ones((1, 2)), np.eye(2)], ids=["equal", "one", "two"])
    def test_what_does_not_differ_is_one_cluster(self, x):
        assert not clusters(x, 0).any()

    def test_three_different_points_are_two_clusters(self):
        assert same_parts(clusters(np.array([[0.0]] * 5 + [[1.0]] * 5 + [[9.0]] * 5), 0), np.repeat([0, 0, 1], 5))

    def test_few_images_do_for_the_choice(self, monkeypatch):
        monkeypatch.setattr(inferred_confounders, "SILHOUETTE_IMAGES", 20)
        x, number = blobs([(0, 0), (5, 0), (0, 5)])
        assert same_parts(clusters(x, 0), number)


def test_george_clusters_each_label_by_itself():
    first, a = blobs([(0, 0), (4, 0), (0, 4)])
    second, b = blobs([(9, 9), (9, 5)])
    y = np.repeat([0, 1], [len(a), len(b)])
    found = REGISTRY["george"](seen(np.concatenate([first, second]), y=y))
    assert same_parts(found[y == 0], a)
    assert same_parts(found[y == 1], b)
    assert found.min() == 0
    assert found.max() == 2


def test_george_takes_a_label_with_one_image():
    x, number = blobs([(0, 0), (4, 0)])
    found = REGISTRY["george"](seen(np.concatenate([x, [[7, 7]]]), y=np.append(np.zeros(60, np.int64), 1)))
    assert found[-1] == 0
    assert same_parts(found[:-1], number)


class TestErrors:
    def test_one_where_the_network_errs(self):
        logits = [(2, 1, 0), (0, 1, 0), (0, 1, 3), (5, 0, 0)]
        assert REGISTRY["errors"](seen(logits=logits, y=[0, 1, 1, 2])).tolist() == [0, 0, 1, 1]

    def test_without_errors_the_highest_losses_of_each_label(self, caplog):
        y = np.repeat([0, 1], [20, 5])
        margins = np.concatenate([np.arange(1, 21), [3, 2, 9, 9, 9]])
        logits = np.stack([np.where(y == 0, margins, 0), np.where(y == 1, margins, 0)], axis=1)
        found = REGISTRY["errors"](seen(logits=logits, y=y))
        assert np.flatnonzero(found).tolist() == [0, 1, 21]  # a tenth of 20, and one of 5
        assert "errs on no training image" in caplog.text

    def test_for_two_labels_it_is_where_eiils_objective_is_highest(self):
        rng = np.random.default_rng(3)
        logits, y = rng.normal(size=(8, 2)), rng.integers(0, 2, 8)
        scale = torch.ones(8, dtype=torch.float64, requires_grad=True)
        scaled = torch.tensor(logits) * scale[:, None]
        losses = torch.nn.functional.cross_entropy(scaled, torch.tensor(y), reduction="sum")
        (slopes,) = torch.autograd.grad(losses, scale)

        def objective(q) -> float:
            shares = torch.tensor(q, dtype=torch.float64)
            return float((shares @ slopes) ** 2 + ((1 - shares) @ slopes) ** 2)

        best = max(itertools.product((0, 1), repeat=8), key=objective)
        found = REGISTRY["errors"](seen(logits=logits, y=y))
        assert 0 < found.sum() < 8
        assert same_parts(np.array(best), found)
        assert objective(found) > max(objective(q) for q in rng.random((100, 8)))


class TestEx2l:
    SHARES = {(0, 0): 90, (0, 1): 10, (1, 0): 10, (1, 1): 90}  # images of label y with confounder c

    def data(self, label_size: float, confounder_size: float = 3.0):
        y, c = (np.concatenate([np.full(n, cell[i]) for cell, n in self.SHARES.items()]) for i in (0, 1))
        noise = np.random.default_rng(0).normal(scale=0.2, size=(len(y), 4))
        return noise + np.stack([label_size * y, confounder_size * c, 0 * y, 0 * y], axis=1), y, c

    def test_a_label_that_features_hold_as_well_does_not_hide_the_confounder(self):
        x, y, c = self.data(label_size=30)
        assert same_parts(clusters(x, 0), y)  # what plain clusters would be
        assert same_parts(REGISTRY["ex2l"](seen(x, y=y)), c)

    def test_values_mean_the_same_across_labels_though_the_confounder_goes_with_the_label(self):
        x, y, c = self.data(label_size=0)
        found = REGISTRY["ex2l"](seen(x, y=y))
        assert same_parts(found, c)
        centred = x - np.stack([x[y == k].mean(axis=0) for k in (0, 1)])[y]
        assert not same_parts(clusters(centred, 0), c)  # why label means are left in

    def test_features_that_hold_nothing_but_the_label_are_one_value(self):
        y = np.repeat([0, 1], 20)
        assert not REGISTRY["ex2l"](seen(np.eye(4)[y], y=y)).any()


class TestAgreement:
    def test_other_names_for_the_same_values_agree(self):
        c, y = np.array([0, 1, 0, 1, 1]), np.array([0, 0, 1, 1, 1])
        found = agreement(1 - c, c, y)
        assert found.pop("majority") == 0.6
        assert found.pop("majority within labels") == pytest.approx((1 / 2 + 2 / 3) / 2)
        assert set(found.values()) == {1.0}
        assert set(found) == {f"{name}{of}" for name in ("nmi", "ami", "accuracy") for of in ("", " within labels")}

    def test_names_that_change_from_label_to_label_agree_within_labels_only(self):
        c, y = np.tile([0, 1], 10), np.repeat([0, 1], 10)
        found = agreement(c ^ y, c, y)
        assert found["ami within labels"] == found["accuracy within labels"] == 1
        assert found["ami"] == pytest.approx(0, abs=0.1)
        assert found["accuracy"] == 0.5

    def test_accuracy_is_of_the_best_one_to_one_assignment(self):
        values = np.array([0, 0, 0, 1, 1, 2, 2, 2])
        true = np.array([0, 0, 1, 0, 0, 1, 1, 1])
        by_hand = max(
            sum((values == a) & (true == 0)) + sum((values == b) & (true == 1))
            for a, b in itertools.permutations(range(3), 2)
        )
        assert agreement(values, true, np.zeros(8, int))["accuracy"] == by_hand / 8

    def test_labels_with_one_true_value_say_nothing(self):
        c = np.array([0, 0, 1, 1])
        assert not [name for name in agreement(c, c, c) if "within" in name]


def splits(n: int = 48) -> list[Split]:
    """Two environments of images (3, 28, 28) whose confounder is the brightness, and goes with the label."""
    found = []
    for e in (0, 2):
        rng = np.random.default_rng(e)
        y = rng.integers(0, 2, n)
        c = y ^ (rng.random(n) < 0.2)
        x = 0.1 * rng.random((n, 3, 28, 28)) + 0.8 * c[:, None, None, None]
        environment = InMemoryEnvironment(torch.from_numpy(x).float(), *map(torch.as_tensor, (y, c)))
        found.append(Split(e, "in", environment, rng.permutation(n)[: n - 8], e))
    return found


def inferred(name: str = "ex2l", directory=None, trained=None, **changed) -> Inferred:
    setting = Setting(2, (3, 28, 28), HPARAMS, steps=10, num_confounders=2)
    return infer(name, trained or splits(), dataclasses.replace(setting, **changed), directory)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The updates that each quick network had."""
    found: list[int] = []

    class Counted(inferred_confounders.ERM):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(0)

        def update(self, *args):
            found[-1] += 1
            return super().update(*args)

    monkeypatch.setattr(inferred_confounders, "ERM", Counted)
    return found


def states() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@pytest.fixture
def known(monkeypatch) -> Callable:
    """``known(values)``: a method that finds these values."""

    def known(values) -> str:
        monkeypatch.setitem(REGISTRY._entries, "known", lambda seen: np.asarray(values))
        return "known"

    return known


class TestInfer:
    @pytest.mark.parametrize("name", list(REGISTRY))
    def test_every_method_gives_aligned_values_and_leaves_the_generators_alone(self, name):
        before, trained = states(), splits()
        found = inferred(name, trained=trained)
        assert states() == before
        for old, new in zip(trained, found.splits, strict=True):
            assert new.c.shape == (len(old),)
            assert new.annotated is None
            assert (new.keys == old.keys).all()
            assert old.inferred is None
        values = np.concatenate([split.c for split in found.splits])
        assert values.min() >= 0
        assert values.max() + 1 == found.num_confounders
        assert found.agreement["nmi"] <= 1

    def test_the_shortcut_is_found(self):
        assert inferred().agreement["ami"] == 1

    def test_equal_seeds_give_equal_values_whatever_was_drawn_before(self):
        first = inferred("george")
        torch.rand(3), np.random.rand(3)
        assert all((a.c == b.c).all() for a, b in zip(first.splits, inferred("george").splits, strict=True))

    def test_true_confounders_change_no_value(self):
        trained = splits()
        others = [
            dataclasses.replace(s, environment=InMemoryEnvironment(*s.environment.tensors, torch.zeros(48)))
            for s in trained
        ]
        found, blind = inferred(trained=trained), inferred(trained=others, num_confounders=1)
        assert all((a.c == b.c).all() for a, b in zip(found.splits, blind.splits, strict=True))
        assert blind.agreement == {}

    def test_five_passes_but_no_more_updates_than_the_run_has(self, counted):
        inferred(steps=1000)
        inferred(steps=3)
        assert counted == [13, 3]  # 5 passes over 80 images, 32 a step

    def test_one_value_for_all_is_refused(self, known):
        with pytest.raises(ValueError, match="known finds no two values"):
            inferred(known(np.zeros(80, int)), steps=1)

    def test_tiny_groups_are_warned_of(self, known, caplog):
        values = np.ones(80, int)
        values[:2] = 0
        inferred(known(values), steps=1)
        assert "inferred groups of less than 10 images: label" in caplog.text
        assert "value 1" not in caplog.text

    def test_a_name_that_is_not_known(self):
        with pytest.raises(NotImplementedError, match="did you mean george"):
            inferred("georg")

    def test_a_network_that_diverges_is_named(self):
        with pytest.raises(ValueError, match="diverged"):
            inferred(hparams=HPARAMS | {"lr": 1e30})


class TestKeeping:
    def test_values_are_read_again_and_nothing_is_trained(self, tmp_path, counted):
        first, second = inferred(directory=tmp_path), inferred(directory=tmp_path)
        assert len(counted) == 1
        assert all((a.c == b.c).all() for a, b in zip(first.splits, second.splits, strict=True))
        assert first.agreement == second.agreement

    @pytest.mark.parametrize(
        "changed", [{"seed": 1}, {"steps": 9}, {"hparams": HPARAMS | {"lr": 0.01}}, {"trained": splits(40)}], ids=list
    )
    def test_those_of_something_else_are_not(self, tmp_path, counted, changed):
        inferred(directory=tmp_path)
        inferred(directory=tmp_path, **changed)
        assert len(counted) == 2

    def test_a_damaged_file_is_made_anew(self, tmp_path, counted, caplog):
        inferred(directory=tmp_path)
        (tmp_path / inferred_confounders.FILE).write_bytes(b"PK half of it")
        inferred(directory=tmp_path)
        assert len(counted) == 2
        assert "made anew" in caplog.text

    def test_round_trip(self, tmp_path):
        assert read(tmp_path, "a") is None
        write(tmp_path, np.array([2, 0, 1]), "a")
        assert read(tmp_path, "a").tolist() == [2, 0, 1]
        assert read(tmp_path, "b") is None
        assert [path.name for path in tmp_path.iterdir()] == [inferred_confounders.FILE]


def test_every_method_says_where_it_comes_from():
    for _, method in REGISTRY.items():
        assert "Source:" in method.__doc__
        assert "Differs:" in method.__doc__
