"""Stored configs: plain YAML with everything resolved, read without references, variables or Python objects."""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ksuit_runner.config.targets import DEEPEST, check_values
from ksuit_runner.errors import ConfigError
from ksuit_runner.system.untrusted_files import UnsafeFileError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_BARE = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
_WORDS = frozenset({"y", "yes", "n", "no", "on", "off", "true", "false", "null", "inf", "nan"})  # to some readers


class _Dumper(_SafeDumper):  # type: ignore[misc]
    """Repeats a shared part instead of referring to it, and quotes text that would read as a number or a keyword."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _text(self, text: str) -> yaml.ScalarNode:
        is_bare = _BARE.fullmatch(text) and text.lower() not in _WORDS
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_bare else "'")


_Dumper.add_representer(str, _Dumper._text)


def format_config(config: Mapping[str, Any]) -> str:
    """Return a resolved config as YAML text, which ``parse_config`` reads; five times as fast as OmegaConf."""
    text: str = yaml.dump(dict(config), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return text


def parse_config(text: str) -> DictConfig:
    """Return the config that a YAML text holds.

    Args:
        text: What ``stored_run.store`` wrote, possibly changed by others since.

    Raises:
        UnsafeFileError: It is broken, too deep or not a mapping, refers to other paths, to variables or to Python
            objects, or repeats a part of itself.
    """
    try:
        _check_events(text)
        config = OmegaConf.create(text)
        values = OmegaConf.to_container(config)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsafeFileError(f"is not a readable config ({reason[:200]})") from None
    assert isinstance(config, DictConfig) and isinstance(values, dict)
    try:
        check_values(values)
    except ConfigError as error:
        raise UnsafeFileError(f"cannot be used: {error}") from None
    return config


def _check_events(text: str) -> None:
    """Refuse what no stored config has before anything is built: a few lines of YAML can expand to terabytes."""
    depth, root = 0, None
    for event in yaml.parse(text, Loader=_Loader):
        root = root or (event if isinstance(event, yaml.NodeEvent) else None)
        if isinstance(event, yaml.AliasEvent):
            raise UnsafeFileError("repeats a part of itself (*)")
        if tag := getattr(event, "tag", None):
            raise UnsafeFileError(f"asks for an object ({tag[:100]})")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise UnsafeFileError(f"is nested more than {DEEPEST} levels deep")
    if not isinstance(root, yaml.MappingStartEvent):
        raise UnsafeFileError("is not a mapping")
