"""Masks passwords and tokens in addresses, overrides and settings, which are never printed, stored or recorded.

What is stored has ``***`` instead. A resumed run gets the real ones from where the user keeps them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MASK = "***"
"""Stands for what is not shown."""

_NAME = (
    r"(?:[\w-]*[_-])?(?:password|passwd|passphrase|secret|secret_key|api_?key|access_key|private_key"
    r"|(?:access|auth|api|tracking|bearer|refresh|session)_token)"
)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
# The password of an address ends at its last @; after a colon there may also be a port.
_PASSWORD = re.compile(r"(?<=://)([^\s:/@?#'\"]*):(?!\d+(?:[/?#]|$))(?:(?!://)[^\s'\"])*@")
_TOKEN = re.compile(r"((?:^|[^\w])(?:git\+)?https?://)[^\s:/@?#'\"]+@", re.IGNORECASE)
_QUERY = re.compile(
    rf"([?&;](?:{_NAME}|pwd|token|key|sig|signature|[\w-]*credential|x-amz-signature)=)[^\s&;#'\"]+", re.IGNORECASE
)
_SETTING = re.compile(rf"(?<![\w-])({_NAME})([\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&}}\])'\"]+)", re.IGNORECASE)


def mask_addresses(text: str) -> str:
    """Mask passwords and tokens in the addresses of a text, such as ``postgresql://me:***@host``."""
    if "://" not in text and "?" not in text:
        return text
    return _QUERY.sub(rf"\g<1>{MASK}", _TOKEN.sub(rf"\g<1>{MASK}@", _PASSWORD.sub(rf"\g<1>:{MASK}@", text)))


def mask_text(text: str) -> str:
    """Mask passwords and tokens in a text that the user reads: addresses, ``password=...`` and the like."""
    return _SETTING.sub(rf"\g<1>\g<2>{MASK}", mask_addresses(text))


def mask_value(name: str, value: Any) -> Any:
    """Mask a value of a config, by its name and by what it is; mappings and lists with all that is in them."""
    if isinstance(value, Mapping):
        return {key: mask_value(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask_value(name, item) for item in value]
    if not isinstance(value, str):
        return value
    return MASK if value and _SECRET_NAME.fullmatch(name.rpartition(".")[2]) else mask_addresses(value)


def mask_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its passwords and tokens."""
    return {key: mask_value(key, value) for key, value in config.items()}


def fill_in(config: Mapping[str, Any], find: Callable[[str, str], str | None]) -> dict[str, Any]:
    """Return a stored config with what is masked in it filled in.

    Args:
        config: The config as plain values.
        find: Returns the real value for a config path and the masked value that is there, or None.
    """
    return {key: _filled(key, value, find) for key, value in config.items()}


def _filled(path: str, value: Any, find: Callable[[str, str], str | None]) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(f"{path}.{key}", item, find) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(f"{path}[{index}]", item, find) for index, item in enumerate(value)]
    found = find(path, value) if isinstance(value, str) and is_masked(path, value) else None
    return value if found is None else found


def masked_values(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the config path and the value of everything in a config that is still masked."""
    found: list[tuple[str, str]] = []

    def note(path: str, value: str) -> None:
        found.append((path, value))

    fill_in(config, note)
    yield from found


def is_masked(path: str, value: str) -> bool:
    """Whether a value of a stored config has a mask in place of a password or token."""
    if MASK not in value:
        return False
    return bool(mask_value(path.partition("[")[0], value.replace(MASK, "x")) == value)
