"""Builds the tracker that a stored run was started with."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.factory import Factory
from ksuit_runner.config.overrides import bare_name, full_name
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.stored_run import read_config_and_text
from ksuit_runner.security.reveal import reveal
from ksuit_runner.security.trust import trust_in


def tracker_factory(paths: PathProvider, composed: DictConfig, overrides: Sequence[str]) -> Factory:
    """Return a factory for the tracker of the stored config, with the overrides of the command line applied.

    Raises:
        ConfigError: The stored config is not this user's, and names something that the user does not trust.
    """
    if not paths.config.is_file() or any(full_name(item) == "tracker" for item in overrides):
        return Factory(composed)
    config, text = read_config_and_text(paths)
    stored = config.tracker
    for item in overrides:
        path = bare_name(item)
        if path.startswith("tracker.") and not item.startswith("~"):
            OmegaConf.update(stored, path.removeprefix("tracker."), OmegaConf.select(composed, path), force_add=True)
    trust = trust_in(paths.signature, [text], paths, stored, overrides)
    return Factory(reveal({"tracker": OmegaConf.to_container(stored)}, overrides), trust)
