"""Durations as they are written in a config: ``90m``, ``1d 12h``."""

import re

from ksuit_runner.errors import ConfigError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:\s*\d+(?:\.\d+)?\s*[dhms])+\s*")


def seconds_of(text: str, name: str) -> float:
    """Return a duration in seconds.

    Args:
        text: Numbers of days (d), hours (h), minutes (m) and seconds (s), such as ``1d 12h``.
        name: Name of the argument, for messages.

    Raises:
        ConfigError: The text is none, or the duration is 0.
    """
    parts = re.findall(r"([\d.]+)\s*([dhms])", text) if _DURATION.fullmatch(text) else []
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds:
        raise ConfigError(f"{name}: '{text}' is not a duration above 0, such as 90m or 1d 12h")
    return seconds
