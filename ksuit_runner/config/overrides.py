"""Overrides of a command line: their names and values, parsed and written."""

import re
from collections.abc import Sequence
from functools import cache
from shlex import quote
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from ksuit_runner.errors import ConfigError, named_type

_BARE = re.compile(r"[\w.+/-]+", re.ASCII)
_KEY = re.compile(r"[\w./$%*@?|+ ()\[\]{}:=,\\\t-]+", re.ASCII)


def to_text(value: Any) -> str:
    """Return a value as the text of an override, which Hydra's parser turns into the same value of the same type.

    Args:
        value: None, a bool, number or text, or a list or mapping of such.

    Raises:
        ConfigError: An override cannot have a value of this type, or cannot express a key of the mapping.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        is_bare = _BARE.fullmatch(value) and not _is_other_value(value)
        return value if is_bare else QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(to_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_key_text(key)}:{to_text(item)}" for key, item in value.items()) + "}"
    raise ConfigError(f"{named_type(value)} cannot be a value of an override")


def _key_text(key: Any) -> str:
    """Return a key of a mapping with special characters escaped, as Hydra does not accept quotes around keys."""
    if not isinstance(key, str):
        return to_text(key)
    if not _KEY.fullmatch(key) or _is_other_value(key):
        raise ConfigError(
            f"the key {key!r} cannot be written in an override. Put the mapping into a YAML file of a group"
        )
    return re.sub(r"[\\()\[\]{}:=,\s]", r"\\\g<0>", key)


def _is_other_value(text: str) -> bool:
    """Whether Hydra reads a text without quotes as a number, a truth value or null."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("null", "true", "false")
    return True


def parse(override: str) -> Override:
    """Parse an override by Hydra's grammar.

    Raises:
        ConfigError: It does not fit the grammar.
    """
    try:
        return _parser().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:  # its parser also raises errors that are not its own
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = cannot_be_read(lines[0][:200]) if lines else "it cannot be read"
        quoted = ". Text with special characters is quoted: 'KEY=\"TEXT\"'" if reason not in lines else ""
        raise ConfigError(f"{override[:200]}: {reason}{quoted}") from None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()  # it keeps nothing of what it parses


def cannot_be_read(reason: str) -> str:
    """Put what the parser of overrides and interpolations says about its grammar into the user's words."""
    place = re.match(
        r"(?:no viable alternative at|mismatched|extraneous|token recognition).*?'(.*?)'?(?: expecting|$)", reason
    )
    if place is None:
        return reason
    where = "its end" if place[1] == "<EOF>" else repr(place[1][:60])
    return f"it cannot be read at {where}; a bracket, brace or quote needs its partner"


def shell_word(text: str) -> str:
    """Return a text quoted as one word of a shell's command line, with the quotes that are easiest to read."""
    in_double_quotes = "'" in text and not set(text) & set('"$`\\!')
    return f'"{text}"' if in_double_quotes else quote(text)


def full_name(override: str) -> str:
    """Return the key of an override, with its ``+`` or ``~``."""
    return override.partition("=")[0]


def value_text(override: str) -> str:
    """Return the value of an override as it is written, empty if it has none."""
    return override.partition("=")[2]


def bare_name(override: str) -> str:
    """Return the key of an override: its config path, or its group."""
    return full_name(override).lstrip("+~").partition("@")[0]


def root(override: str) -> str:
    """Return the first part of the config path of an override."""
    return bare_name(override).partition(".")[0]


def value_of(name: str, overrides: Sequence[str]) -> str | None:
    """Return the value that a key at the top of the config is given on the command line, None for none or null.

    Raises:
        ConfigError: It is given without a value, or twice.
    """
    values = [value_text(item).strip() for item in overrides if bare_name(item) == name and "=" in item]
    if len(values) > 1:
        raise ConfigError(f"{name}: given {len(values)} times: {', '.join(values)}")
    if not values or values[0] == "null":
        return None
    value = re.sub(r"""^(['"])(.*)\1$""", r"\2", values[0])
    if not value:
        raise ConfigError(
            f"{name}=: the value is empty, as with an unset variable of the shell. For none, write {name}=null"
        )
    return value


def allow_only(overrides: Sequence[str], command: str, *others: str) -> None:
    """Refuse what a command does not take.

    Args:
        overrides: The command line.
        command: The key that asks for the command, such as ``sync``.
        *others: First parts of the config paths that may be given with it.

    Raises:
        ConfigError: Something else is given.
    """
    allowed = f"only {', '.join(others)}" if others else "nothing else"
    for item in overrides:
        if root(item) not in (command, *others):
            raise ConfigError(f"{item}: with {command}= {allowed} can be given")
