"""Restores the passwords and tokens of a stored config: given again, or found in the user's config or environment."""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ksuit_runner.config.compose import compose_locations
from ksuit_runner.errors import ConfigError
from ksuit_runner.security.masking import MASK, fill_in, mask_addresses, masked_values

URI_VARIABLE, PASSWORD_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"
"""Variables of the environment that the tracking URI, or the password in it, is taken from."""


def reveal(config: Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    """Return a stored config with its passwords and tokens.

    The tracking URI is the one of the user's own config or of the environment, if that is the same but for the
    password; else the password comes from the environment. All others have to be given again.

    Args:
        config: The config as plain values, with what the command line says.
        overrides: Overrides of the command line.

    Raises:
        ConfigError: One is not found; says how to give it.
    """
    if not any(masked_values(config)):
        return config
    own = compose_locations(overrides).tracker.get("uri")

    def find(path: str, value: str) -> str | None:
        if path != "tracker.uri":
            return None
        for known in (own, os.environ.get(URI_VARIABLE)):
            if known and mask_addresses(known) == value:
                return str(known)
        password = os.environ.get(PASSWORD_VARIABLE)
        return value.replace(MASK, quote(password, safe=""), 1) if password and f"{MASK}@" in value else None

    found = fill_in(config, find)
    for path, value in masked_values(found):
        known = f"Set {URI_VARIABLE} or {PASSWORD_VARIABLE}, or give" if path == "tracker.uri" else "Give"
        raise ConfigError(f"the password in {value!r} is not stored with the run. {known} {path}= again", path=path)
    return found
