"""Reads the YAML files of ``conf`` folders for Hydra, and says which file and line are wrong."""

from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.plugins.config_source import ConfigResult
from omegaconf import Container, DictConfig, OmegaConf

from ksuit_runner.errors import ConfigError, did_you_mean, short
from ksuit_runner.paths import shown_path

_WORDS = ("optional", "override")
"""What may be written before a group in `defaults`."""
_KINDS = {yaml.SequenceStartEvent: "list", yaml.ScalarEvent: "text"}


class ProjectSource(FileConfigSource):
    """The files below a folder; what cannot be read ends with the name of the file, and nothing is ignored."""

    @staticmethod
    def scheme() -> str:
        """Return how search paths of this kind begin."""
        return "project"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file.

        Raises:
            ConfigError: It cannot be read, or is no mapping.
        """
        path = Path(self.path, self._normalize_file_name(config_path))
        text = _read(path)
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=_parse(path, text),
            header=self._get_header_dict(text),
        )


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")  # some editors begin a file with a mark, which would hide its first line
    except OSError as error:
        raise ConfigError(f"{shown_path(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{shown_path(path)}, line {line}: this is not UTF-8; save the file in that encoding"
        ) from error


def _parse(path: Path, text: str) -> DictConfig:
    try:
        events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if kind := next((kind for event in islice(events, 3) if (kind := _KINDS.get(type(event)))), None):
            raise ConfigError(f"{shown_path(path)}: a config has keys, `KEY: VALUE`, and this is a {kind}")
        config = OmegaConf.load(StringIO(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        line = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
        raise ConfigError(f"{shown_path(path)}{where}: {_problem(error)}{_hint(error, line)}") from error
    assert isinstance(config, DictConfig)
    defaults = config.get("defaults")
    _check_defaults(path, OmegaConf.to_container(defaults) if isinstance(defaults, Container) else defaults)
    return config


def _problem(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong; what is said with a "but" needs what was expected before it."""
    problem, context = error.problem or "", error.context or ""
    return f"{context}, {problem}" if context and (not problem or problem.startswith("but ")) else problem


def _hint(error: yaml.MarkedYAMLError, line: str) -> str:
    if "\t" in line:
        return ". It has a tab: YAML is indented with spaces"
    if error.problem == "mapping values are not allowed here":
        return ". Keys that belong together begin in the same column; a text with ': ' in it needs quotes"
    return ""


def _check_defaults(path: Path, defaults: Any) -> None:
    where = f"{shown_path(path)}: defaults"
    if not isinstance(defaults, list | None):
        raise ConfigError(f"{where}: a list is needed, `- GROUP: CHOICE`, not {short(defaults)}")
    overridden: set[str] = set()
    for item in defaults or ():
        choices = list(item.values()) if isinstance(item, dict) else [item]
        names = [name for choice in choices for name in (choice if isinstance(choice, list) else [choice])]
        if len(choices) != 1 or not all(isinstance(name, str | None) for name in names):
            raise ConfigError(f"{where}: a choice is `- GROUP: NAME` or `- GROUP: [NAME, NAME]`, not {short(item)}")
        words = str(next(iter(item))).split() if isinstance(item, dict) else []
        if unknown := set(words[:-1]) - set(_WORDS):
            word = min(unknown)
            raise ConfigError(f"{where}: '{word}' means nothing before a group. {did_you_mean(word, _WORDS)}")
        if "override" in words[:-1]:
            if (group := words[-1]) in overridden:
                raise ConfigError(f"{where}: two lines override '{group}', and only one of them would count")
            overridden.add(group)
