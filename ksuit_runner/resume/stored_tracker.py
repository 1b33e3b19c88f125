"""The tracker that a stored run was started with."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.factory import Factory
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.stored_run import read_config_and_text
from ksuit_runner.security.reveal import reveal
from ksuit_runner.security.trust import trust_in


def tracker_factory(paths: PathProvider, composed: DictConfig, overrides: Sequence[str]) -> Factory:
    """Return a factory of the tracker of the run's start, with what the command line says about it.

    Raises:
        ConfigError: The stored config is not this user's, and names what the user does not trust.
    """
    if not paths.config.is_file() or any(item.startswith("tracker=") for item in overrides):
        return Factory(composed)
    config, text = read_config_and_text(paths)
    stored = config.tracker
    for item in overrides:
        place = item.lstrip("+").partition("=")[0]
        if place.startswith("tracker."):
            OmegaConf.update(stored, place.removeprefix("tracker."), OmegaConf.select(composed, place), force_add=True)
    trust = trust_in(paths.signature, [text], paths, stored, overrides)
    return Factory(reveal({"tracker": OmegaConf.to_container(stored)}, overrides), trust)
