import functools
import math

import pytest

from domainbed.lib.query import Q, hashable, make_selector_fn

PEOPLE = Q(
    [
        {"name": "Bob", "age": 40, "home": {"city": "Oslo", "pets": ["cat"]}},
        {"name": "Alice", "age": 20, "home": {"city": "Lima", "pets": ["dog"]}},
        {"name": "Carol", "age": 40, "home": {"city": "Lima", "pets": ["cat"]}},
    ]
)


class TestSelectors:
    def test_paths_bind_tighter_than_commas_and_blanks_are_dropped(self):
        select = make_selector_fn(" name , home.city")
        assert [select(person) for person in PEOPLE] == [("Bob", "Oslo"), ("Alice", "Lima"), ("Carol", "Lima")]

    def test_a_function_is_taken_as_it_is(self):
        def age(person):
            return person["age"]

        assert make_selector_fn(age) is age

    @pytest.mark.parametrize("selector", [functools.partial(len), len, 3, None])
    def test_other_things_are_refused(self, selector):
        with pytest.raises(TypeError, match="wrap it in a lambda"):
            make_selector_fn(selector)

    def test_hashable_keeps_what_has_a_hash_and_never_confuses_a_list_with_a_string(self):
        assert hashable((1, "x")) == (1, "x")
        assert hashable([1]) != hashable("[1]")
        assert hash(hashable({"a": [1]})) == hash(hashable({"a": [1]}))


class TestQ:
    def test_behaves_as_a_list(self):
        q = Q([3, 1, 2])
        assert (len(q), q[0], q[1:], list(q), str(q), repr(q)) == (3, 3, [1, 2], [3, 1, 2], "[3, 1, 2]", "[3, 1, 2]")
        assert type(q[::-1]) is list
        assert q == Q([3, 1, 2])
        assert q == [3, 1, 2]
        assert q != [3, 1]

    def test_groups_are_sorted_by_key_and_keep_the_order_within(self):
        groups = PEOPLE.group("age")
        assert [key for key, _ in groups] == [20, 40]
        assert [type(group) for _, group in groups] == [Q, Q]
        assert groups[1][1].select("name") == ["Bob", "Carol"]

    def test_groups_by_values_without_a_hash(self):
        counts = PEOPLE.group("home.pets, age").map(lambda key, group: (key, len(group)))
        assert counts == [((["cat"], 40), 2), ((["dog"], 20), 1)]

    def test_groups_by_values_that_have_no_order(self):
        groups = Q([{"k": {"a": 1}}, {"k": {"a": 0}}, {"k": {"a": 1}}, {"k": None}]).group("k")
        assert {str(key): len(group) for key, group in groups} == {"{'a': 1}": 2, "{'a': 0}": 1, "None": 1}

    def test_map_unpacks_for_functions_of_several_parameters_only(self):
        pairs = Q([(1, 2), (3, 4)])
        assert pairs.map(lambda a, b: a * b) == [2, 12]
        assert pairs.map(lambda pair: pair[0]) == [1, 3]
        assert PEOPLE.group_map("age", lambda age, group: (age, len(group))) == [(20, 1), (40, 2)]

    def test_select_filter_flatten_unique(self):
        assert PEOPLE.select("home.pets").flatten() == ["cat", "dog", "cat"]
        assert PEOPLE.select("home.pets").unique() == [["cat"], ["dog"]]
        assert Q([2, 1, 2, 3, 1]).unique() == [2, 1, 3]
        assert PEOPLE.filter(lambda person: person["age"] < 30).select("name") == ["Alice"]
        assert PEOPLE.filter_equals("age, home.pets", (40, ["cat"])).select("name") == ["Bob", "Carol"]
        assert Q([1, None, 0]).filter_not_none() == [1, 0]
        assert Q([1.0, float("nan"), "x", None]).filter_not_nan() == [1.0, "x", None]

    def test_summaries(self):
        q = Q([1, 2, 6])
        assert (q.min(), q.max(), q.sum(), q.len(), q.mean()) == (1, 6, 9, 3, 3)
        assert q.std() == pytest.approx(math.sqrt((4 + 1 + 9) / 3))
        assert q.mean_std() == (q.mean(), q.std())

    def test_mean_and_std_of_nothing_are_nan_without_a_warning(self):
        assert math.isnan(Q([]).mean())
        assert math.isnan(Q([]).std())

    def test_argmax_returns_the_first_of_the_largest_elements(self):
        assert PEOPLE.argmax("age")["name"] == "Bob"

    def test_sorting_is_stable_and_puts_nan_first(self):
        nan = float("nan")
        assert str(Q([2, nan, 1, float("-inf")]).sorted()) == "[nan, -inf, 1, 2]"
        assert PEOPLE.sorted(key=lambda person: person["age"]).select("name") == ["Alice", "Bob", "Carol"]
