"""Explains Hydra's errors in the user's words."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ksuit_runner.config.flatten import nodes
from ksuit_runner.config.groups import CONFIG_NAME, choices, groups, hint_of_files, register_search_path, shipped_conf
from ksuit_runner.config.overrides import bare_name, parse, value_text
from ksuit_runner.errors import ConfigError, did_you_mean, suggest

MISTAKES = (HydraException, OmegaConfBaseException, RecursionError)
"""What Hydra raises for a user's mistake; ``explain`` puts it into the user's words."""
_WIDEST = 500  # characters of a line that explains a mistake
_MOST_PATHS = 3


def explain(error: Exception, overrides: Sequence[str], config: DictConfig | None = None) -> ConfigError:
    """Explain an error of Hydra in the user's words, with the nearest valid name.

    Args:
        error: What Hydra raised.
        overrides: The overrides that were given.
        config: The config that they were applied to; by default the one that Hydra composes.
    """
    lines = str(_explained(error, overrides, config)).splitlines()
    return ConfigError("\n".join(line if len(line) <= _WIDEST else f"{line[:_WIDEST]}…" for line in lines))


def _explained(error: Exception, overrides: Sequence[str], config: DictConfig | None) -> ConfigError:
    if isinstance(error, RecursionError):
        return ConfigError("an override or a YAML file is nested too deep")
    text = str(error)
    if "override_grammar" in text and (unreadable := _unreadable(overrides)) is not None:
        return unreadable
    if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _unknown_choice(missing[1])
    if re.search(r"Key '[^']+' is not in struct|Could not override '[^']+'", text):
        return _unknown_key(f"{text}\n{error.__cause__ or ''}", overrides, config)
    if twice := re.search(r"Multiple values for ([^\s.]+)", text):
        return _chosen_already(twice[1], overrides)
    if removed := re.search(r"Could not delete (?:from config\. )?'([^'=]+)=?([^']*)'", text):
        return _cannot_remove(removed[1], removed[2], overrides, config)
    if several := re.search(r"Ambiguous value for argument '([^'=]+)=(.+)'", text):
        key, values = several.groups()
        return ConfigError(
            f"{key}={values}: a list is written as '{key}=[{values}]'; for a run with each of them, add -m"
        )
    if merged := re.search(r"Error merging override (.+)", text):
        return ConfigError(f"{merged[1]}: it does not fit what is there. {_kind_there(merged[1], config)}".rstrip())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ConfigError("\n".join(lines[:4]) or type(error).__name__)


def paths_named(name: str, overrides: Sequence[str] = (), cutoff: float = 0.7) -> list[str]:
    """Return config paths that end in a name, as it may be meant, or in a similar one if there are none.

    Args:
        name: Last part of a config path, such as ``lr`` of ``optimizer.lr``.
        overrides: Overrides that choose from groups; others are ignored.
        cutoff: How similar they have to be.
    """
    tree = OmegaConf.to_container(_groups_chosen(overrides))
    assert isinstance(tree, dict)
    by_name: dict[str, list[str]] = {}
    for path, _ in nodes(tree):
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    near = [name] if name in by_name else get_close_matches(name, by_name, 1, cutoff)
    return by_name[near[0]][:_MOST_PATHS] if near else []


def _unreadable(overrides: Sequence[str]) -> ConfigError | None:
    """Return why the first override that does not fit the grammar does not."""
    for item in overrides:
        try:
            parse(item)
        except ConfigError as error:
            return error
    return None


def _unknown_choice(path: str) -> ConfigError:
    group, _, choice = path.rpartition("/")
    if not group:
        return ConfigError(f"there is no config '{choice}'. {did_you_mean(choice, groups())}")
    available = choices(group)
    if not available and group not in groups():
        return ConfigError(f"{path}: there is no group '{group}'. {did_you_mean(group, groups())}")
    listed = f"\nThere are: {', '.join(available)}" if suggest(choice, available) else ""
    hint = hint_of_files(group, choice)
    return ConfigError(f"{group}: there is no '{choice}'. {hint or did_you_mean(choice, available)}{listed}")


def _unknown_key(text: str, overrides: Sequence[str], config: DictConfig | None) -> ConfigError:
    full = re.search(r"full_key: (.+)", text) or re.search(r"Could not override '([^']+)'", text)
    path = full[1].strip() if full else ""
    about = [item for item in overrides if f"{path}.".startswith(f"{bare_name(item)}.")]
    given = max(about, key=lambda item: len(bare_name(item)), default=path)
    others = [item for item in overrides if item != given]
    parent, _, name = path.rpartition(".")
    node = _groups_chosen(others) if config is None else config
    node = OmegaConf.select(node, parent) if parent else node
    if not isinstance(node, DictConfig | None):
        return ConfigError(f"{given}: '{parent}' is a value and has no keys")
    if not parent and not suggest(name, map(str, node or {})) and (paths := paths_named(name, others)):
        meant = " or ".join(f"{path}={value_text(given)}" for path in paths)
        return ConfigError(f"{given}: the config has no '{name}'. Did you mean {meant}?")
    where = f"'{parent}' has" if parent else "the config has"
    how = f"To add a new key, write +{given}"
    if bare_name(given) in groups():
        how += f". To replace what is there, write a file in conf/{bare_name(given)}/ and choose it"
    return ConfigError(f"{given}: {where} no '{name}'. {did_you_mean(name, map(str, node or {}))}\n{how}")


def _chosen_already(group: str, overrides: Sequence[str]) -> ConfigError:
    """Explain ``+experiment=NAME``, where the group is part of the config without that."""
    given = next((item for item in overrides if item.startswith("+") and bare_name(item) == group), group)
    return ConfigError(f"{given}: the config has this group already. Without the +: {given.lstrip('+')}")


def _cannot_remove(key: str, value: str, overrides: Sequence[str], config: DictConfig | None) -> ConfigError:
    given = next((item for item in overrides if item.startswith("~") and bare_name(item) == key), f"~{key}")
    if key in groups():
        one = f"for all but one, '~{key}.{value}'" if value else f"without one of them, '~{key}.NAME'"
        return ConfigError(
            f"{given}: this group is a list, which is replaced. For none of them, write '{key}=[]'; {one}"
        )
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(_groups_chosen([]) if config is None else config, parent) if parent else None
    near = suggest(name, map(str, node)) if isinstance(node, DictConfig) else None
    paths = [f"{parent}.{near}"] if near else [] if parent else paths_named(name)
    meant = " or ".join(f"'~{path}'" for path in paths)
    hint = f" Did you mean {meant}?" if meant else ""
    return ConfigError(f"{given}: there is no '{key}' to remove.{hint}")


def _kind_there(override: str, config: DictConfig | None) -> str:
    """Say what kind of value an override would replace."""
    there = OmegaConf.select(_groups_chosen([]) if config is None else config, bare_name(override))
    if isinstance(there, DictConfig):
        return f"'{bare_name(override)}' is a mapping: {{KEY: VALUE}}, or null"
    return f"'{bare_name(override)}' is a list: [VALUE,VALUE]" if isinstance(there, ListConfig) else ""


def _groups_chosen(overrides: Sequence[str]) -> DictConfig:
    """Return the config that the group choices among some overrides compose, an empty one if they do not compose."""
    register_search_path()
    with initialize_config_dir(str(shipped_conf()), version_base="1.3"):
        try:
            return compose(CONFIG_NAME, overrides=[item for item in overrides if "." not in bare_name(item)])
        except (HydraException, OmegaConfBaseException):
            return OmegaConf.create()
