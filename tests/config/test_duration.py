import pytest

from ksuit_runner.config.duration import seconds_of
from ksuit_runner.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("1d 12h", 129_600), ("1.5h30s", 5430), (" 2 h 5 m ", 7500), ("0.25s", 0.25)]
)
def test_a_duration_is_the_sum_of_its_parts_in_seconds(text, seconds):
    assert seconds_of(text, "max_time") == seconds


@pytest.mark.parametrize("text", ["2 hours", "12:00:00", "0h", "0m 0.0s", "1.2.3h", "-1h", "90", "h", ""])
def test_what_is_no_duration_above_0_is_refused_with_the_name_of_the_argument(text):
    with pytest.raises(ConfigError) as raised:
        seconds_of(text, "max_time")
    assert str(raised.value) == f"max_time: '{text}' is not a duration above 0, such as 90m or 1d 12h"
