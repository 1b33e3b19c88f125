"""A composed config as YAML, with the comments of the files that it was composed from."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.groups import CONFIG_NAME, choices, files, groups

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_GLOBAL = "# @package _global_"
_Path = tuple[str, ...]


def commented(config: DictConfig, chosen: Mapping[str, Any]) -> str:
    """Return a config as YAML in which the comment that explains a key stands above it.

    Args:
        config: The composed config.
        chosen: What is chosen of each group, as far as it is one.
    """
    comments = _comments_in(CONFIG_NAME, ())
    for group in groups():
        for choice in sorted(choices(group), key=lambda choice: choice == chosen.get(group)):  # the chosen one counts
            comments |= _comments_in(f"{group}/{choice}", (group,), is_chosen=choice == chosen.get(group))
    text = OmegaConf.to_yaml(config)
    lines = text.splitlines()
    for path, line, column in reversed([*_keys(yaml.compose(text, _LOADER))]):
        lines[line:line] = [f"{' ' * column}{comment}" for comment in comments.get(path, ())]
    return "\n".join(lines) + "\n"


def _comments_in(name: str, package: _Path, is_chosen: bool = True) -> dict[_Path, list[str]]:
    """Return the comments of a file by the config paths of their keys."""
    found: dict[_Path, list[str]] = {}
    for file in reversed(files(name)):
        text = file.read_text(encoding="utf-8", errors="replace")
        is_global = text.startswith(_GLOBAL)
        if is_global and not is_chosen:  # it says why it sets a value, and not what that is for
            continue
        lines = text.splitlines()
        try:
            document = yaml.compose(text, _LOADER)
        except yaml.YAMLError:  # one that is chosen has been read before
            continue
        for path, line, _ in _keys(document):
            above = line
            while above and lines[above - 1].lstrip().startswith("#") and lines[above - 1] != _GLOBAL:
                above -= 1
            beside = re.search(r"\s(#\s.*)", lines[line])
            comments = [item.strip() for item in lines[above:line]] + ([beside[1]] if beside else [])
            if comments:  # what a class is for, its object is for
                found[path if is_global else (*package, *path) if path != ("_target_",) else package] = comments
    return found


def _keys(node: yaml.Node | None, above: _Path = ()) -> Iterator[tuple[_Path, int, int]]:
    """Yield the config paths of all keys of a document, with line and column; lists have none."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*above, str(key.value))
            yield path, key.start_mark.line, key.start_mark.column
            yield from _keys(value, path)
