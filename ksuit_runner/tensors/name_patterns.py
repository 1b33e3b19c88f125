"""Patterns of names; in those of parameters and modules, ``{}`` can stand for the number of a layer."""

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase, translate

from ksuit_runner.errors import ConfigError, did_you_mean

_NUMBER = "0number0"
"""Stands for a layer's number while a pattern is translated."""


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns, as those of a shell, matches a name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern as a regular expression, with a group for the number of each layer."""
    return re.compile(translate(pattern.replace("{}", _NUMBER)).replace(_NUMBER, r"(\d+)"))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern matches."""
    form = compile_pattern(pattern)
    return [name for name in names if form.match(name)]


def matching_modules(patterns: Sequence[str], names: Collection[str], path: str, kind: str = "module") -> list[str]:
    """Return the names of the modules that any of the patterns matches, each once.

    Args:
        patterns: The patterns.
        names: The names of all modules.
        path: Config path of the patterns, for messages.
        kind: What they are, for messages.

    Raises:
        ConfigError: One matches none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if not (matched := matching(pattern, names)):
            raise ConfigError(f"'{pattern}' matches no {kind}. {did_you_mean(pattern, names)}", path=path)
        found |= dict.fromkeys(matched)
    return list(found)
