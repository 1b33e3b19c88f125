"""Escapes names of metrics, parameters and tags for MLflow, which accepts few characters.

``recall@5`` is ``recall:40:5`` there: a character's code between colons. Names that MLflow accepts stay as they are,
except for a colon before a digit or a letter from a to f. No two names share an escaped one, and each is read back
exactly.
"""

import re
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise

LONGEST = 250
"""Characters that a name in MLflow may have."""

_REFUSED = re.compile(r"[^/\w.\- :]|:(?=[0-9a-f])")
_ESCAPED = re.compile(r":([0-9a-f]{1,6}):")


@lru_cache(4096)
def escape(name: str) -> str:
    """Return the name under which MLflow has a metric, parameter or tag; it may be too long."""
    # MLflow refuses names that normalize to another path: with '//', with '.' or '..', or with a slash at an end.
    parts = name.split("/")
    first = {number for number, part in enumerate(parts) if part in (".", "..")} | ({0} if name[:2] == ".." else set())
    escaped = [
        _code(part[0]) + _escape(part[1:]) if number in first else _escape(part) for number, part in enumerate(parts)
    ]
    slashes = [_code("/") if "" in pair else "/" for pair in pairwise(parts)]
    return "".join(part + slash for part, slash in zip(escaped, [*slashes, ""], strict=True))


def metric_name(key: str) -> str:
    """Return the name under which MLflow has a metric; it may be too long.

    MLflow's page has a section for each name up to its last slash. So only the first slash stays one, and
    ``accuracy/test`` and ``accuracy/test/ema``, as ``accuracy/test ema``, are in one section.
    """
    section, slash, rest = escape(key).replace(" ", _code(" ")).partition("/")
    return section + slash + rest.replace("/", " ")


def metric_key(name: str) -> str:
    """Return the key of a metric by its name in MLflow."""
    return unescape(name.replace(" ", "/"))


def escape_short(name: str) -> str:
    """Return a name for MLflow that need not be read back; the end of a long one is replaced by its hash."""
    escaped = escape(name) or ":"
    if len(escaped) <= LONGEST:
        return escaped
    return f"{escaped[: LONGEST - 17]}-{sha256(escaped.encode()).hexdigest()[:16]}"


def unescape(name: str) -> str:
    """Return the original of an escaped name."""
    return _ESCAPED.sub(_character, name)


def _escape(text: str) -> str:
    return _REFUSED.sub(lambda match: _code(match[0]), text)


def _code(character: str) -> str:
    return f":{ord(character):x}:"


def _character(match: re.Match[str]) -> str:
    code = int(match[1], 16)
    return chr(code) if code < 0x110000 else match[0]
