"""Numbers, durations and texts as tables, progress bars and pages show them."""

from math import isfinite

SHORT_ID = 8
"""Characters of a run's id in tables; they are enough to name it."""


def format_number(value: float) -> str:
    """Write a number with about four significant digits; whole numbers, such as counts, in full."""
    if isfinite(value) and value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.1f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def shortened(text: str, longest: int) -> str:
    """Return a text, cut to a length."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def format_duration(seconds: float) -> str:
    """Write a duration with its two largest units, such as ``2h 05m``, or ``4.2s``."""
    if seconds < 10:
        return f"{round(seconds, 1):g}s"
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24:02}h"
    if hours:
        return f"{hours}h {minutes % 60:02}m"
    return f"{minutes}m {seconds % 60:02}s" if minutes else f"{seconds}s"
