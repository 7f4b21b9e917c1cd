"""Scores against scikit-learn, slow loops and cases whose answer is known."""

import numpy as np
import pytest
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier

from domainbed.feature_scores import NONE, Score, probe, probe_given, proxy_a_distance, purity, silhouette

RNG = np.random.default_rng(0)
HALVES = np.repeat([0, 1], 100)
NOISE = RNG.normal(size=(200, 4))
BLOBS = NOISE * 0.1 + np.where(HALVES[:, None] == 1, [5.0, 0, 0, 0], [0, 5.0, 0, 0])


def shuffled(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).permutation(values)


def slow_silhouette(x: np.ndarray, values: np.ndarray) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = 1 - unit @ unit.T
    found = []
    for i, own in enumerate(values):
        others = [distances[i][values == v].mean() for v in set(values) - {own}]
        mates = (values == own) & (np.arange(len(x)) != i)
        a, b = distances[i][mates].mean(), min(others)
        found.append((b - a) / max(a, b))
    return float(np.mean(found))


def slow_purity(x: np.ndarray, values: np.ndarray, k: int) -> float:
    shares = []
    for i in range(len(x)):
        order = np.argsort(((x - x[i]) ** 2).sum(axis=1))
        shares.append((values[order[order != i][:k]] == values[i]).mean())
    pairs = [values[i] == values[j] for i in range(len(x)) for j in range(len(x)) if i != j]
    return (np.mean(shares) - np.mean(pairs)) / (1 - np.mean(pairs))


class TestSilhouette:
    def test_is_what_its_definition_says(self):
        values = RNG.integers(0, 3, 200)
        assert silhouette(NOISE, values).value == pytest.approx(slow_silhouette(NOISE, values))
        assert silhouette(NOISE, values, "euclidean").value == pytest.approx(silhouette_score(NOISE, values))

    def test_blobs_and_chance(self):
        assert silhouette(BLOBS, HALVES).value > 0.95
        assert silhouette(BLOBS, shuffled(HALVES)) == Score(pytest.approx(0, abs=0.03), 0.0)

    def test_directions_count_and_lengths_do_not(self):
        scaled = BLOBS * RNG.uniform(0.1, 10, (200, 1))
        assert silhouette(scaled, HALVES).value == pytest.approx(silhouette(BLOBS, HALVES).value)


class TestPurity:
    @pytest.mark.parametrize("k", [1, 10])
    def test_is_what_its_definition_says(self, k):
        x, values = NOISE[:40], RNG.integers(0, 3, 40)
        assert purity(x, values, "euclidean", k).value == pytest.approx(slow_purity(x, values, k))

    def test_one_neighbour_is_leave_one_out_accuracy(self):
        values = RNG.integers(0, 2, 60)
        x = NOISE[:60] + values[:, None]
        right = [
            KNeighborsClassifier(1).fit(np.delete(x, i, 0), np.delete(values, i)).predict(x[i : i + 1])[0] == values[i]
            for i in range(60)
        ]
        ones = values.sum()
        q = (ones * (ones - 1) + (60 - ones) * (59 - ones)) / (60 * 59)
        assert purity(x, values, "euclidean", 1).value == pytest.approx((np.mean(right) - q) / (1 - q))

    def test_blobs_and_chance_also_of_unequal_shares(self):
        assert purity(BLOBS, HALVES) == Score(1.0, 0.0)
        rare = np.repeat([0, 1, 2], [10, 30, 160])
        assert purity(NOISE, shuffled(rare)).value == pytest.approx(0, abs=0.06)


class TestProbe:
    def test_blobs_and_chance(self):
        assert probe(BLOBS, HALVES) == Score(1.0, 0.5)
        many = np.concatenate([NOISE, RNG.normal(size=(1800, 4))])
        values = RNG.integers(0, 4, 2000)
        assert probe(many, values) == Score(pytest.approx(0.25, abs=0.06), 0.25)

    def test_rare_values_count_as_much_as_frequent_ones(self):
        rare = np.repeat([0, 1], [20, 180])  # saying 1 always is right in 90 % of the images
        assert probe(np.zeros((200, 2)), rare).value == pytest.approx(0.5)

    def test_scale_and_offset_of_a_feature_do_not_matter(self):
        x = NOISE + HALVES[:, None]
        moved = x * [1, 100, 0.01, 1] + [5, -300, 0, 1]
        assert probe(moved, HALVES).value == probe(x, HALVES).value

    def test_the_seed_draws_the_split(self):
        x = NOISE + 0.5 * HALVES[:, None]
        assert probe(x, HALVES, 3) == probe(x, HALVES, 3)
        assert len({probe(x, HALVES, seed).value for seed in range(5)}) > 1


class TestProbeGiven:
    def test_what_goes_together_is_no_news(self):
        y = np.tile([0, 1], 100)
        c = np.where(RNG.random(200) < 0.8, y, 1 - y)  # 80 % of the images of a label share their confounder
        only_label = np.column_stack([y + 0.01 * NOISE[:, 0], NOISE[:, 1]])
        assert probe(only_label, c).value > 0.7
        assert probe_given(only_label, c, y) == Score(pytest.approx(0.5, abs=0.15), 0.5)
        both = np.column_stack([y, c]) + 0.01 * NOISE[:, :2]
        assert probe_given(both, c, y) == Score(1.0, 0.5)

    def test_the_mean_over_what_can_be_asked(self):
        y = np.repeat([0, 1, 2], [80, 60, 60])
        c = np.concatenate([np.tile([0, 1], 40), np.tile([0, 1, 2], 20), np.zeros(60, dtype=int)])  # y = 2: c = 0 only
        x = NOISE + c[:, None]
        each = [probe(x[y == one], c[y == one]).value for one in (0, 1)]
        assert probe_given(x, c, y) == Score(pytest.approx(np.mean(each)), pytest.approx((1 / 2 + 1 / 3) / 2))


class TestProxyADistance:
    def test_alike_and_apart(self):
        tested = HALVES == 1
        assert proxy_a_distance(BLOBS, tested) == Score(2.0, 0.0)
        alike = np.random.default_rng(2).normal(size=(4000, 3))
        assert proxy_a_distance(alike, np.arange(4000) % 2 == 0).value == pytest.approx(0, abs=0.15)

    def test_it_follows_from_the_error(self):
        x = NOISE + HALVES[:, None]
        error = 1 - probe(x, HALVES).value
        assert proxy_a_distance(x, HALVES == 1).value == pytest.approx(2 * (1 - 2 * error))


@pytest.mark.parametrize("score", [silhouette, purity, probe, lambda x, v: proxy_a_distance(x, v == 1)])
def test_of_a_single_value_there_is_none(score):
    assert score(NOISE, np.ones(200, dtype=int)) == NONE


def test_of_too_few_images_there_is_none():
    nine = np.repeat([0, 1], [191, 9])
    ten = np.repeat([0, 1], [190, 10])
    assert probe(NOISE, nine) == NONE
    assert probe(NOISE, ten).value is not None
    assert probe_given(NOISE, nine, np.zeros(200)) == NONE
    assert probe_given(NOISE, HALVES, HALVES) == NONE  # a label tells all
    assert silhouette(NOISE, np.arange(200)) == NONE
    assert purity(NOISE[:10], HALVES[95:105]) == NONE
    assert proxy_a_distance(NOISE, nine == 1) == NONE
