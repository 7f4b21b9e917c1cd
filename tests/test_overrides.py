import json
from collections import Counter

import numpy as np
import pytest

from domainbed import overrides


def test_overrides():
    assert overrides.parse(None) == {}
    assert overrides.parse("") == {}
    assert overrides.parse('{"lr": 0.1, "backbone": "x"}') == {"lr": 0.1, "backbone": "x"}


@pytest.mark.parametrize("text", ["lr=0.1", "[1]", "{'lr': 1}", "3"])
def test_other_texts_are_no_overrides(text):
    with pytest.raises(ValueError, match="JSON object like") as error:
        overrides.parse(text)
    assert str(error.value).endswith(text)


def rng(seed: int = 3) -> np.random.RandomState:
    return np.random.RandomState(seed)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("U(-1, 2.5)", lambda r: r.uniform(-1, 2.5)),
        ("10^U(-1, 2)", lambda r: 10 ** r.uniform(-1, 2)),
        ("2^U(3, 5.5)", lambda r: 2 ** r.uniform(3, 5.5)),
        (" 10 ^ U( -1e-1 ,+2.0) ", lambda r: 10 ** r.uniform(-0.1, 2)),
        ("int 2^U(3, 9)", lambda r: int(2 ** r.uniform(3, 9))),
        ("int U(-4, -2)", lambda r: int(r.uniform(-4, -2))),
        ("U(2, 2)", lambda r: 2.0),
        ([0.0, 0.1, 0.5], lambda r: float(r.choice([0.0, 0.1, 0.5]))),
        (["sgd", "adam", True], lambda r: ["sgd", "adam", True][r.choice(3)]),
    ],
)
def test_ranges_draw_as_the_registrys_own_functions_do(form, expected):
    (draw,) = overrides.parse_ranges(json.dumps({"x": form})).values()
    for seed in range(20):
        assert draw(rng(seed)) == expected(rng(seed))
        assert type(draw(rng(seed))) is type(expected(rng(seed)))


def test_each_value_of_a_list_has_an_equal_chance():
    draw, generator = overrides.parse_ranges('{"x": ["a", "b", "c"]}')["x"], rng()
    counts = Counter(draw(generator) for _ in range(3000))
    assert all(abs(counts[value] - 1000) < 100 for value in "abc")  # four standard deviations


def test_no_ranges():
    assert overrides.parse_ranges(None) == overrides.parse_ranges("") == overrides.parse_ranges("{}") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr=1", "ranges are a JSON object like .*; got: lr=1"),
        ('["U(0, 1)"]', "ranges are a JSON object"),
        ('{"lr": "3^U(0, 1)"}', r'range of lr is "3\^U\(0, 1\)"; take "U\(a, b\)", .* or a list of values'),
        ('{"lr": "U(0; 1)"}', "range of lr is"),
        ('{"lr": "intU(0, 1)"}', "range of lr is"),
        ('{"lr": 0.1}', "range of lr is 0.1; take"),
        ('{"lr": []}', r"range of lr is \[\]; take"),
        ('{"lr": [[1]]}', r"range of lr is \[\[1\]\]; take"),
        ('{"lr": "U(a, 1)"}', "range of lr is 'U.a, 1.', whose bounds are no numbers"),
        ('{"lr": "U(0, inf)"}', "give finite bounds"),
        ('{"lr": "10^U(300, 400)"}', "beyond what a number holds"),
        ('{"lr": "10^U(2, -1)"}', r"lower bound above the upper; write U\(-1, 2\)"),
    ],
)
def test_other_texts_are_no_ranges(text, message):
    with pytest.raises(ValueError, match=message):
        overrides.parse_ranges(text)
