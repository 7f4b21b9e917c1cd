import math
from fractions import Fraction as F

import pytest

from domainbed import scores

ACC = {0: F(1, 2), 1: F(1, 4), 2: F(1), 3: F(3, 4)}


def test_adjusted_average_by_hand() -> None:
    assert scores.adjusted_average(ACC, {0: 6, 1: 1, 3: 3}) == F(6, 10) / 2 + F(1, 10) / 4 + F(3, 10) * 3 / 4
    assert scores.adjusted_average(ACC, {1: 7}) == F(1, 4)
    assert scores.adjusted_average(ACC, dict.fromkeys(ACC, 5)) == scores.group_mean(ACC) == F(5, 8)


@pytest.mark.parametrize(
    ("measured", "training"),
    [({0: F(1, 2)}, {0: 99, 1: 1}), (ACC, {4: 3, 5: 2}), (ACC, {}), (ACC, {0: 0})],
    ids=["a training group is empty", "no training group occurs", "counts not known", "nothing to train on"],
)
def test_what_cannot_be_adjusted_is_none(measured: dict[int, F], training: dict[int, int]) -> None:
    assert scores.adjusted_average(measured, training) is None


def test_an_empty_training_group_needs_no_accuracy() -> None:
    assert scores.adjusted_average({0: F(1, 2)}, {0: 3, 1: 0}) == F(1, 2)


def test_score() -> None:
    assert scores.aa_wga(0.8, 0.5) == pytest.approx(0.65)
    assert math.isnan(scores.aa_wga(math.nan, 0.5))


def test_what_is_granted_is_scored() -> None:
    assert scores.Granted(0.75, 0.25).score() == 0.5
    assert scores.Granted(0.75, 0.25).score(lambda aa, wga: wga) == 0.25
    assert scores.Granted(0.75, None).score() == scores.Granted(0.75, None).score(lambda aa, wga: wga) == 0.75
    assert math.isnan(scores.Granted(math.nan, None).score())
