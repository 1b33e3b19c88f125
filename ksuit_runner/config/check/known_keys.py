"""Keys at the top of a composed config that nothing reads: a misspelt one in a YAML file would change nothing."""

import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.groups import CONFIG_NAME, files, files_with, groups
from ksuit_runner.config.overrides import root
from ksuit_runner.config.project_source import named
from ksuit_runner.config.schema import OBJECT_SPECS
from ksuit_runner.errors import ConfigError, did_you_mean

_OF_THE_WHOLE = ("experiment", "debug")
"""Groups whose files are about the whole config, and leave no key of their own."""
_KEY = re.compile(r"^(\w+):", re.MULTILINE)


def check_keys(config: DictConfig, overrides: Sequence[str]) -> None:
    """Check that every key at the top is one of the default config, a group, added by ``+KEY=``, or referred to.

    Args:
        config: A config as Hydra has composed it, with its interpolations.
        overrides: The overrides that it was composed with.

    Raises:
        ConfigError: Nothing would ever read a key.
    """
    added = {root(item) for item in overrides if item.startswith("+")}
    known = {key for path in files(CONFIG_NAME) for key in _KEY.findall(path.read_text(encoding="utf-8"))}
    known |= {*groups(), *(path.partition(".")[0] for path in OBJECT_SPECS)} - {*_OF_THE_WHOLE}
    unknown = [str(key) for key in config if key not in known | added]
    text = str(OmegaConf.to_container(config)) if unknown else ""
    for key in unknown:
        if re.search(rf"\$\{{[^$']*\b{re.escape(key)}\b", text):
            continue
        if key in _OF_THE_WHOLE:
            raise ConfigError(
                "a file of this group is about the whole config: its first line has to be `# @package _global_`",
                path=key,
            )
        where = "".join(f" ({named(path)})" for path in files_with(rf"^{re.escape(key)}\s*:")[:1])
        raise ConfigError(
            f"the config has no such key, and nothing refers to it{where}. {_meant(key, known)}", path=key
        )


def _meant(key: str, known: set[str]) -> str:
    return did_you_mean(key, known, longest=0) or f"As a note: +{key}=VALUE"
