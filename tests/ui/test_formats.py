import pytest

from ksuit_runner.ui.formats import format_duration, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.97531, "0.9753"),
        (1e-5, "1e-05"),
        (3.0, "3"),
        (60000, "60000"),
        (-1234.56, "-1234.6"),
        (0.0, "0"),
        (2.5e12, "2.5e+12"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_are_compact(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4s"),
        (2, "2s"),
        (61, "1m 01s"),
        (3599.6, "1h 00m"),
        (7500, "2h 05m"),
        (90000, "1d 01h"),
        (864000, "10d 00h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
