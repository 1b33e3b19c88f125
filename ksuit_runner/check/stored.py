"""Reading a stored config as data: plain YAML, stored with everything resolved, that stands for what it says alone."""

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ksuit_runner.errors import ConfigError
from ksuit_runner.stored_files import UnsafeFileError
from ksuit_runner.targets import DEEPEST, check_values

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_config(text: str) -> DictConfig:
    """Return the config that a YAML text holds.

    Args:
        text: What ``stored_run.store`` wrote, or what somebody made of it.

    Raises:
        UnsafeFileError: It is broken, too deep or no mapping, refers to other places, to variables or to Python
            objects, or repeats a part of itself.
    """
    try:
        _check_events(text)
        config = OmegaConf.create(text)
        values = OmegaConf.to_container(config)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsafeFileError(f"is no config that can be read ({reason[:200]})") from None
    assert isinstance(config, DictConfig) and isinstance(values, dict)
    try:
        check_values(values)
    except ConfigError as error:
        raise UnsafeFileError(f"cannot be used: {error}") from None
    return config


def _check_events(text: str) -> None:
    """Refuse what no stored config has, before anything is built of it: a few lines of YAML can stand for terabytes."""
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
        raise UnsafeFileError("is no mapping")
