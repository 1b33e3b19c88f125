"""Keys of a composed config that nothing reads: a misspelt one in a YAML file would change nothing."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.explain import file_with, paths_named
from ksuit_runner.config.groups import CONFIG_NAME, choices, files, groups
from ksuit_runner.config.overrides import bare_name, value_text
from ksuit_runner.config.schema import OBJECT_SPECS, objects_beside
from ksuit_runner.errors import ConfigError, did_you_mean, is_misspelling, suggest
from ksuit_runner.paths import shown_path

_OF_THE_WHOLE = ("experiment", "debug")
"""Groups whose files are about the whole config, and leave no key of their own."""
_KEY = re.compile(r"^(\w+):", re.MULTILINE)


class KnownKeys:
    """The keys of the default config and the groups of this folder, read when they are first asked for, and once."""

    @cached_property
    def at_top(self) -> set[str]:
        """The keys at the top of a config."""
        known = {key for path in files(CONFIG_NAME) for key in _KEY.findall(path.read_text(encoding="utf-8"))}
        return known | {*groups(), *(path.partition(".")[0] for path in OBJECT_SPECS)} - {*_OF_THE_WHOLE}

    @cached_property
    def settings(self) -> dict[str, set[str]]:
        """The keys in each node of the default config that is no object, by the name of the node.

        A project may have a default config of its own, with settings that its code reads.
        """
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        *own, default = [yaml.load(path.read_text(encoding="utf-8"), loader) for path in files(CONFIG_NAME)]
        nodes = {key: node for key, node in default.items() if isinstance(node, dict) and node and key != "hydra"}
        further = [config for config in own if isinstance(config, dict)]
        return {
            key: {name for config in (default, *further) for name in config.get(key) or ()}
            for key, node in nodes.items()
            if "_target_" not in node
        }


def check_keys(
    config: DictConfig, overrides: Sequence[str], is_stored: bool = False, known: KnownKeys | None = None
) -> None:
    """Check that something reads every key at the top, in the settings of the default config, and beside optimizers.

    A key is read if it is one of the default config or a group; what is referred to by ``${KEY}`` is taken as well,
    and so is a note that is added by ``+KEY=``, unless it is rather a known key that is misspelt. The arguments of
    objects are checked with these.

    Args:
        config: A config as Hydra has composed it, with its interpolations.
        overrides: The overrides that it was composed with, or that a stored one is changed by.
        is_stored: Whether it is that of a stored run, of which only what is added now is checked: the rest has been,
            and no longer says what referred to what.
        known: The keys that are known; a sweep passes the same ones for all of its jobs.

    Raises:
        ConfigError: Nothing would ever read a key.
    """
    added = {bare_name(item): value_text(item) for item in overrides if item.startswith("+")}
    known = known or KnownKeys()
    nodes = [("", config, known.at_top)]
    nodes += [(f"{key}.", config.get(key), names) for key, names in known.settings.items()]
    for prefix, node, names in nodes:
        for key in map(str, node) if isinstance(node, DictConfig) else ():
            path = f"{prefix}{key}"
            notes = {name: value for name, value in added.items() if f"{name}.".startswith(f"{path}.")}
            if key in names or (is_stored and not notes):
                continue
            is_meant = notes and not (is_misspelling(key, names) and _would_fit(path, suggest(key, names), notes))
            if not is_meant and (_is_dotted(key, names) or not _is_referred_to(path, config)):
                raise _unknown(prefix, key, names, overrides, bool(notes))
    if not is_stored:
        _check_beside("optimizer", config)


def _would_fit(path: str, near: str | None, notes: Mapping[str, str]) -> bool:
    """Whether what notes say would mean something for a known key that is spelt nearly as theirs.

    Args:
        path: Path of their key.
        near: The known key; where it is a group, one of its files is chosen, or something below it is set.
        notes: Values by the paths that are set.
    """
    files_of_group = choices(near) if near in groups() else ()
    return any(
        name != path or not files_of_group or not {*re.findall(r"[^\[\], ]+", value)}.isdisjoint(files_of_group)
        for name, value in notes.items()
    )


def _check_beside(path: str, config: DictConfig) -> None:
    """Check that there is nothing beside several objects by name, as where it was meant for a single one."""
    node = None if OmegaConf.is_interpolation(config, path) else config.get(path)
    plain: Any = OmegaConf.to_container(node) if isinstance(node, DictConfig) else None
    names = objects_beside(path, plain)
    for key, value in plain.items() if names else ():
        is_plain = value is not None and not isinstance(value, dict)
        if is_plain and not _is_referred_to(f"{path}.{key}", config):
            below = " or ".join(f"{path}.{name}.{key}" for name in names)
            message = f"there are several by name, each with arguments of its own: write {below}"
            raise ConfigError(message, path=f"{path}.{key}")


def _is_referred_to(path: str, config: DictConfig) -> bool:
    """Whether something refers to a key by its path, from beside it (``${.KEY}``), or to the whole node it is in."""
    node, _, key = path.rpartition(".")
    ways = [rf"\b{re.escape(path)}\b", rf"(?<!\w)\.+{re.escape(key)}\b"]
    ways += [rf"\b{re.escape(node)}\b(?!\.)"] if node else []
    return re.search(rf"\$\{{[^$']*({'|'.join(ways)})", str(OmegaConf.to_container(config))) is not None


def not_global(group: str) -> ConfigError:
    """Return the error for a file whose content stands in the node of its group instead of at the top."""
    return ConfigError(
        "a file of this group is about the whole config: its first line has to be `# @package _global_`", path=group
    )


def _unknown(prefix: str, key: str, known: set[str], overrides: Sequence[str], is_note: bool) -> ConfigError:
    path = f"{prefix}{key}"
    if path in _OF_THE_WHOLE:
        return not_global(path)
    file = file_with(rf"^{' +' if prefix else ''}{re.escape(key)}\s*:", overrides)
    where = f" ({shown_path(file)})" if file else ""
    there = f"'{prefix.rstrip('.')}'" if prefix else "the config"
    hint = _in_yaml([path]) if _is_dotted(key, known) else did_you_mean(key, known, longest=8 if prefix else 0)
    hint = hint or _in_yaml([] if prefix else paths_named(key)) or f"As a note: +{path}=VALUE"
    hint += " A note has to have another name" if is_note else ""
    return ConfigError(f"{there} has no such key, and nothing refers to it{where}. {hint}", path=path)


def _is_dotted(key: str, known: set[str]) -> bool:
    """Whether a key is written as the path of something in a node that is known: nobody refers to such a key."""
    return "." in key and key.split(".")[0] in known


def _in_yaml(paths: Sequence[str]) -> str:
    """Ask whether one of some config paths is meant, as a file has it: a key with dots in it would be a single key."""
    written = [f"`{': {'.join(path.split('.'))}: VALUE{'}' * path.count('.')}`" for path in paths]
    return f"Did you mean {' or '.join(written)}?" if written else ""
