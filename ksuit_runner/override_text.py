"""Values and names as the overrides of a command line have them."""

import re
from typing import Any

from ksuit_runner.errors import ConfigError


def to_text(value: Any) -> str:
    """Return a value of a YAML file as an override has it.

    Raises:
        ConfigError: The value is of a kind that no override can have.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w.+/-]+", value) else "'" + value.replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(to_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{to_text(str(key))}:{to_text(item)}" for key, item in value.items()) + "}"
    raise ConfigError(f"sweep.params: a {type(value).__name__} cannot be a value of an override")


def full_name(override: str) -> str:
    """Return what an override is about, with its ``+`` or ``~``."""
    return override.partition("=")[0]


def bare_name(override: str) -> str:
    """Return what an override is about: its place in the config, or its group."""
    return full_name(override).lstrip("+~").partition("@")[0]


def root(override: str) -> str:
    """Return the first part of an override's place in the config."""
    return bare_name(override).partition(".")[0]
