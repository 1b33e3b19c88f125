"""Applies overrides to a stored config: only groups that are chosen again come from today's YAML files."""

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.compose import (
    NOT_STORED,
    Template,
    chooses_group,
    compose_config,
    refuse_empty_mappings,
    refuse_long_overrides,
)
from ksuit_runner.config.differences import ABSENT, put_differences
from ksuit_runner.config.explain import MISTAKES, explain
from ksuit_runner.config.groups import groups
from ksuit_runner.config.overrides import parse
from ksuit_runner.errors import ConfigError


def with_overrides(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a stored config with overrides applied to it; what they refer to (``${...}``) is resolved there.

    A value is set, added or removed as Hydra does it. A group that is chosen (``callbacks=[ema]``) is replaced by what
    its YAML file says today; what that file chooses of other groups, and a file for the whole config
    (``experiment=NAME``), change what they would change in the default config.

    Args:
        config: The stored config.
        overrides: Overrides of the command line.

    Raises:
        ConfigError: One of them names something that does not exist, has no meaning, or refers to Hydra's own config.
    """
    refuse_long_overrides(overrides)
    parsed = [parse(item) for item in overrides]
    for item in parsed:
        if item.is_sweep_override():
            raise ConfigError(f"{item.input_line}: a stored run takes one value, not a sweep")
        if re.search(r"\$\{\s*hydra:", str(item.input_line)):
            raise ConfigError(f"{item.input_line}: a stored run is not composed by Hydra again; write the value itself")
    names = groups()
    chosen = [item for item in parsed if not item.is_hydra_override() and chooses_group(item, names)]
    for_hydra = [str(item.input_line) for item in parsed if item.is_hydra_override()]
    values = [item for item in parsed if not item.is_hydra_override() and item not in chosen]
    tree = _plain(config)
    if chosen:
        _choose(tree, chosen, for_hydra)
    changed = OmegaConf.create(tree, flags={"struct": True})
    try:
        changed = Template(changed).set_values(values)
    except MISTAKES as error:
        raise explain(error, overrides, changed) from None
    refuse_empty_mappings(changed, overrides)
    return changed


def _choose(tree: dict[Any, Any], chosen: Sequence[Override], for_hydra: Sequence[str]) -> None:
    """Put newly chosen groups into a config; explicit choices take precedence over those of a file."""
    default = _plain(compose_config(for_hydra))
    composed = []
    for item in chosen:
        line = str(item.input_line)
        today = _plain(compose_config([*for_hydra, line if item.package else line.lstrip("+")]))
        composed.append((item, today.get(item.key_or_group, ABSENT)))
        named = () if item.package else (item.key_or_group,)
        put_differences(
            tree, *({key: node for key, node in values.items() if key not in named} for values in (default, today))
        )
    for item, node in composed:
        group = item.key_or_group
        if node is ABSENT or item.package:
            if item.is_delete():
                tree.pop(group, None)
        elif item.is_add():
            tree[group] = {**(tree.get(group) or {}), **node}
        else:
            tree[group] = node


def _plain(config: DictConfig) -> dict[Any, Any]:
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict)
    return {key: value for key, value in values.items() if key not in NOT_STORED}
