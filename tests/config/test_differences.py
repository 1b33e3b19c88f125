"""How configs differ: NaN is itself, and what differs can be put into another config."""

from math import nan

from ksuit_runner.config.differences import ABSENT, differences, is_same, put_differences


def test_nan_is_equal_to_itself_at_any_depth_and_to_nothing_else():
    assert is_same({"a": [float("nan"), {"b": float("nan")}]}, {"a": [float("nan"), {"b": float("nan")}]})
    assert not is_same({"a": [nan]}, {"a": [0.0]})
    assert not is_same([nan], [nan, nan])
    assert not is_same({"a": 1}, {"b": 1})
    assert not is_same([1], {"a": 1})


def test_differences_are_config_paths_with_their_old_and_new_values():
    old = {"a": {"b": 1, "c": nan, "d": 2}, "e": {"f": 1}, "g": [1, 2]}
    new = {"a": {"b": 3, "c": float("nan")}, "e": {}, "g": [1, 2], "h": None}
    found = [("a.b", 1, 3), ("a.d", 2, ABSENT), ("e", {"f": 1}, {}), ("h", ABSENT, None)]
    assert list(differences(old, new)) == found


def test_what_differs_is_put_into_another_config_and_the_rest_of_it_stays():
    target = {"a": {"b": 9, "x": 9}, "gone": 1, "k": 5, "same": 7}
    put_differences(target, {"a": {"b": 1}, "gone": 1, "same": 1}, {"a": {"b": 2, "n": {"m": 1}}, "k": 6, "same": 1})
    assert target == {"a": {"b": 2, "x": 9, "n": {"m": 1}}, "k": 6, "same": 7}
