"""Nested configs by their config paths, which are unique."""

from ksuit_runner.config.flatten import flatten, nodes

CONFIG = {"a.b": 1, "a": {"b": 2, "c": {}}, "a\\": {"b": [{"d": 3}]}, 5: None}


def test_lists_and_empty_mappings_are_values_and_names_with_dots_do_not_collide():
    assert flatten(CONFIG) == {"a\\.b": 1, "a.b": 2, "a.c": {}, "a\\\\.b": [{"d": 3}], "5": None}
    assert flatten({}) == {}


def test_mappings_come_before_what_is_in_them():
    assert [path for path, _ in nodes(CONFIG)] == ["a\\.b", "a", "a.b", "a.c", "a\\\\", "a\\\\.b", "5"]
