from math import nan

import pytest

from ksuit_runner.callback_bases.ranking import Ranking
from ksuit_runner.errors import ConfigError
from ksuit_runner.metric_property import MetricPropertyProvider

KEYS = ("accuracy/test", "loss/test")


def ranking(size=3, min_delta=0.0, keys=KEYS):
    return Ranking(MetricPropertyProvider(), keys, size, min_delta)


def test_names_are_in_the_order_of_their_values():
    found = ranking()
    values = {"a": (0.5, 1.0), "b": (0.7, 1.0), "c": (0.7, 0.5), "d": (nan, 0.1), "e": (0.1, 0.1), "f": (0.6, 9.0)}
    places = [found.insert(value, name) for name, value in values.items()]
    assert places == [0, 0, 0, None, None, 2]
    assert [name for _, name in found.top] == ["c", "b", "f"]


def test_only_the_first_metric_has_to_be_better_by_enough():
    found = ranking(min_delta=0.1)
    assert [found.insert(values, "x") for values in ((0.5, 1.0), (0.55, 1.0), (0.7, 1.0), (0.7, 0.99))] == [0, 1, 0, 0]


def test_what_is_stored_fits_a_ranking_of_another_size_and_with_further_metrics():
    wide = ranking(keys=KEYS[:1])
    for name, value in (("a", 0.5), ("b", 0.7), ("c", 0.6)):
        wide.insert((value,), name)
    narrow = ranking(size=2)
    narrow.restore(wide.top)
    assert [name for _, name in narrow.top] == ["b", "c"]
    assert narrow.insert((0.7, 9.0), "d") == 0  # the loss of the other one is not known


def test_a_metric_without_a_better_direction_decides_nothing():
    with pytest.raises(ConfigError, match="samples_per_second"):
        ranking(keys=("accuracy/test", "samples_per_second"))
