"""Parameters as stores show them best: numbers as numbers."""

import json


def plain_value(text: str) -> bool | int | float | str:
    """Return the number or truth value that a parameter's text stands for, and the text if it is none."""
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text
