"""Explains Hydra's errors in the user's words."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import hydra.conf
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ksuit_runner.config.flatten import nodes
from ksuit_runner.config.groups import (
    CONFIG_NAME,
    choices,
    files,
    files_with,
    groups,
    hint_of_files,
    register_search_path,
    shipped_conf,
)
from ksuit_runner.config.overrides import bare_name, cannot_be_read, parse, value_text
from ksuit_runner.errors import MOST_LISTED, ConfigError, did_you_mean, is_misspelling, suggest
from ksuit_runner.paths import shown_path

MISTAKES = (HydraException, OmegaConfBaseException, RecursionError)
"""What Hydra raises for a user's mistake; ``explain`` puts it into the user's words."""
_WIDEST = 500  # characters of a line that explains a mistake
_MOST_PATHS = 3
_NEAR = 0.7  # how similar a name is that may be meant
IN_CONF = re.compile(r"(?:^|/)conf/([\w-]+)/(.+?)(?:\.ya?ml)?$")
"""The path of a file in ``conf/``: its group and its choice."""


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
    if isinstance(error, ConfigError):  # of the project's files
        return error
    if isinstance(error, RecursionError):
        return ConfigError("an override or a YAML file is nested too deep, or files choose each other in `defaults`")
    text = str(error) or str(error.__cause__ or "")
    if "override_grammar" in text and (unreadable := _unreadable(overrides)) is not None:
        return unreadable
    if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _unknown_choice(missing[1], overrides)
    if in_file := re.search(r"In '([\w/]+)': Could not override '([\w/]+)@?([\w.]*)'", text):
        return _cannot_override(*in_file.groups())
    if order := re.search(r"In ([\w/]+): Override .* is defined before", text):
        return ConfigError("defaults: lines with `override` come after all others", path=_file_of(order[1]))
    if of_hydra := re.search(r"Key '([^']+)' not in '(\w+)'\n\s+full_key: (\S+)", text):
        name, kind, path = of_hydra.groups()
        return ConfigError(f"there is no such key. {did_you_mean(name, vars(getattr(hydra.conf, kind)()))}", path=path)
    if re.search(r"Key '[^']+' is not in struct|Could not override '[^']+'", text):
        return _unknown_key(f"{text}\n{error.__cause__ or ''}", overrides, config)
    if clash := re.search(r"In '([^']+)': .*\n?Cannot merge \w+ with \w+", text):
        return _other_kind(clash[1]) or ConfigError(text.splitlines()[0])
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
    if (no_choice := _no_choice(overrides)) is not None:
        return no_choice
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if full := re.search(r"full_key: (\S+)", text):
        return ConfigError(cannot_be_read(lines[0]), path=full[1])
    return ConfigError("\n".join(lines[:4]) or type(error).__name__)


def paths_named(name: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return config paths that end in a name, or in a similar one if there are none: what may be meant by it.

    Args:
        name: Last part of a config path, such as ``lr`` of ``optimizer.lr``.
        overrides: Overrides that choose from groups; others are ignored.
    """
    tree = OmegaConf.to_container(_groups_chosen(overrides))
    assert isinstance(tree, dict)
    by_name: dict[str, list[str]] = {}
    for path, _ in nodes(tree):
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    near = [name] if name in by_name else get_close_matches(name, by_name, 1, _NEAR)
    return by_name[near[0]][:_MOST_PATHS] if near else []


def file_with(pattern: str, overrides: Sequence[str]) -> Path | None:
    """Return the YAML file with a line that matches: of several, one that an override chooses, or the first one."""
    found = [path for path in files_with(pattern) if path.stem != CONFIG_NAME]
    names = [(bare_name(item), choice) for item in overrides for choice in re.findall(r"[\w/-]+", value_text(item))]
    chosen = (path for path in found for group, choice in names if path.match(f"{group}/{choice}.yaml"))
    return next(chosen, found[0] if found else None)


def _unreadable(overrides: Sequence[str]) -> ConfigError | None:
    """Return why the first override that does not fit the grammar does not."""
    for item in overrides:
        try:
            parse(item)
        except ConfigError as error:
            return error
    return None


def _no_choice(overrides: Sequence[str]) -> ConfigError | None:
    """Return why the first override that chooses from a group names no file; None if all do."""
    for item in map(parse, overrides):
        group, value = item.key_or_group, item.value()
        names = value if isinstance(value, list) else [value]
        if group in groups() and not item.is_delete() and not all(isinstance(name, str) for name in names):
            none = f"For none: {group}=[]. " if value is None else ""
            return ConfigError(
                f"{item.input_line}: a choice is the name of a file in conf/{group}/. {none}{_listed(group)}"
            )
    return None


def _other_kind(name: str) -> ConfigError | None:
    """Return which key of a file for the whole config has a list where the config has keys, or the other way round."""
    path = files(name)[0]
    default, own = (OmegaConf.to_container(config) for config in (_groups_chosen([]), OmegaConf.load(path)))
    there = dict(nodes(default)) if isinstance(default, dict) else {}
    for key, value in nodes(own) if isinstance(own, dict) else ():
        kinds = [isinstance(item, list) for item in (value, there.get(key)) if isinstance(item, list | dict)]
        if len(set(kinds)) == 2:
            needed = (
                "keys are needed, `KEY: VALUE`, and this is a list" if kinds[0] else "a list is needed, [VALUE, VALUE]"
            )
            how = f". To choose files: `- override /{key}: [NAME, NAME]` among the defaults" if key in groups() else ""
            return ConfigError(f"{key}: {needed}{how}", path=shown_path(path))
    return None


def _unknown_choice(path: str, overrides: Sequence[str]) -> ConfigError:
    if in_conf := IN_CONF.search(path):
        return ConfigError(f"{path}: a choice is named without folder and ending. Write {in_conf[1]}={in_conf[2]}")
    group, _, choice = path.rpartition("/")
    if not group:
        return ConfigError(f"there is no config '{choice}'. {did_you_mean(choice, groups())}")
    is_given = any(bare_name(item) == group.split("/")[0] for item in overrides)
    written = None if is_given else file_with(rf"^\s*-.*(?<![\w-]){re.escape(choice)}(?![\w-])", overrides)
    where = f"{shown_path(written)}: " if written else ""
    available = choices(group)
    if not available and group not in groups():
        return ConfigError(f"{where}{path}: there is no group '{group}'. {did_you_mean(group, groups())}")
    listed = f"\n{_listed(group)}" if suggest(choice, available) or len(available) > MOST_LISTED else ""
    hint = hint_of_files(group, choice)
    return ConfigError(f"{where}{group}: there is no '{choice}'. {hint or did_you_mean(choice, available)}{listed}")


def _listed(group: str) -> str:
    """Return the choices of a group as a sentence, or where to see them if they are many."""
    available = choices(group)
    if len(available) > MOST_LISTED:
        return f"All {len(available)}: --help {group}"
    return f"There are: {', '.join(available)}"


def _cannot_override(name: str, key: str, package: str) -> ConfigError:
    """Explain a line `- override GROUP: CHOICE` that Hydra cannot follow.

    Args:
        name: Name of the file that it is in, such as ``experiment/mine``.
        key: The group, as Hydra understands it.
        package: Where its content would go.
    """
    file, (folder, _, _) = _file_of(name), name.rpartition("/")
    if package.split(".")[0] == folder.split("/")[0] != "":
        return ConfigError("it is about the whole config: its first line has to be `# @package _global_`", path=file)
    group = key.removeprefix(f"{folder}/")
    if group not in groups():
        return ConfigError(f"defaults: there is no group '{group}'. {did_you_mean(group, groups())}", path=file)
    if group != key:
        return ConfigError(f"defaults: a slash is missing. Write `- override /{group}: NAME`", path=file)
    return ConfigError(f"defaults: '{group}' can be chosen on the command line only: {group}=NAME", path=file)


def _file_of(name: str) -> str:
    """Return the path of the file of a group and choice, as it is called in messages."""
    found = files(name)
    return shown_path(found[0]) if found else f"conf/{name}.yaml"


def _unknown_key(text: str, overrides: Sequence[str], config: DictConfig | None) -> ConfigError:
    full = re.search(r"full_key: (.+)", text) or re.search(r"Could not override '([^']+)'", text)
    path = full[1].strip() if full else ""
    names = {item: bare_name(item) for item in overrides}
    about = [item for item, name in names.items() if f"{path}.".startswith(f"{name}.") or name.startswith(f"{path}.")]
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
    valid = [*map(str, node or {})]
    wrong = f"{given}: {where} no '{name}'. {did_you_mean(name, valid)}"
    if is_misspelling(name, valid):
        return ConfigError(wrong)
    how = f"To add a new key, write +{given}"
    if bare_name(given) in groups():
        how += f". To replace what is there, write a file in conf/{bare_name(given)}/ and choose it"
    return ConfigError(f"{wrong}\n{how}")


def _chosen_already(group: str, overrides: Sequence[str]) -> ConfigError:
    """Explain ``+experiment=NAME``, or the same in a file, where the group is part of the config without that."""
    given = next((item for item in overrides if item.startswith("+") and bare_name(item) == group), None)
    if given is None:
        where = file_with(rf"^\s*-(?!\s*override\s).*\b{group}\s*:", overrides)
        return ConfigError(
            f"defaults: the config has chosen from '{group}' already. Write `- override /{group}: NAME`",
            path=shown_path(where) if where else group,
        )
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
    GlobalHydra.instance().clear()  # it is in use where the command line starts a run
    with initialize_config_dir(str(shipped_conf()), version_base="1.3"):
        try:
            return compose(CONFIG_NAME, overrides=[item for item in overrides if "." not in bare_name(item)])
        except (HydraException, OmegaConfBaseException):
            return OmegaConf.create()
