"""Composes a run's config with Hydra."""

import logging
import os
import pickle
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ksuit_runner.config.explain import explain
from ksuit_runner.config.groups import CONFIG_NAME, groups, register_search_path, shipped_conf
from ksuit_runner.config.overrides import bare_name, full_name, parse, root, value_text
from ksuit_runner.config.schema import OBJECT_SPECS
from ksuit_runner.errors import ConfigError

_LOCATIONS = ("output_dir", "tracker", "trust")
_BESIDE = re.compile(r"tracker\.[\w-]+\.")
VERBOSE = "hydra.verbose"
_LONGEST_OVERRIDE = 20_000
SWEEP_NODES = ("sweep", "launcher")
"""Keys at the top of the config that are about a sweep and not about its runs."""
ASKS_HYDRA = re.compile(r"\$\{\s*hydra:")
"""An interpolation of Hydra's own config, which resolves only in the config that Hydra composed last."""
COMMAND_KEYS = (
    *("resume", "fork", "evaluate", "sync", "list", "show", "report", "compare", "export", "leaderboard"),
    *("init", "find_batch_size", "annotate", "export_to", "export_as", "predict", "predict_on"),
)
"""Keys at the top of the config that ask for something else than a new run."""
NOT_STORED = (*SWEEP_NODES, *COMMAND_KEYS, "trust")
"""Keys at the top of the config that are not stored with a run."""


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose a config as the command line does.

    Args:
        overrides: Overrides in Hydra's grammar.

    Raises:
        ConfigError: An override names nothing that exists, or has no meaning.
    """
    return compose_with_choices(overrides)[0]


def compose_with_choices(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """Compose a config, and also return what is chosen of the groups of which one is; see ``compose_config``."""
    refuse_long_overrides(overrides)
    register_search_path()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(shipped_conf()), version_base="1.3"):
            config = compose(CONFIG_NAME, overrides=list(overrides), return_hydra_config=True)
            drop_settings_of_what_is_left_out(config, overrides)
        chosen, verbose = dict(config.hydra.runtime.choices), config.hydra.verbose
        config = _without_hydra(config)
    except Exception as error:  # only Hydra runs here, and it does not wrap everything that its parser raises
        raise explain(error, overrides) from None
    is_verbose(verbose)
    refuse_empty_mappings(config, overrides)
    return config, chosen


def drop_settings_of_what_is_left_out(config: DictConfig, overrides: Sequence[str]) -> None:
    """Remove settings that a file has for objects that ``callbacks=[...]`` has taken out of the choice of that file.

    Without the override these settings are those of an object. All others that belong to none are mistakes.

    Args:
        config: A config that Hydra, which is still initialized, has composed.
        overrides: The overrides that it was composed with.
    """
    for group in ("callbacks", "default_callbacks"):
        if all(full_name(item) != group for item in overrides):
            continue
        named = {bare_name(item).partition(".")[2].partition(".")[0] for item in overrides if root(item) == group}
        nodes = config[group]
        if not isinstance(nodes, DictConfig):
            continue
        alone = [name for name in nodes if _is_settings_only(nodes[name]) and name not in named]
        if alone:
            others = [item for item in overrides if root(item) != group]
            chosen = compose(CONFIG_NAME, overrides=others)[group] or {}
            with open_dict(nodes):
                for name in alone:
                    if name in chosen and not _is_settings_only(chosen[name]):
                        del nodes[name]


def _is_settings_only(node: Any) -> bool:
    return isinstance(node, DictConfig) and "_target_" not in node


def _without_hydra(config: DictConfig) -> DictConfig:
    """Remove Hydra's own node from a config; ``${hydra:...}`` resolves from now on as it does in a run."""
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = os.path.abspath(config.hydra.run.dir)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


class Template:
    """A composed config, of which copies with other plain values are made in 3 ms, where Hydra composes in 100.

    Args:
        config: A config as Hydra has composed it. The groups are those that there are now.
    """

    def __init__(self, config: DictConfig) -> None:
        self._content = pickle.dumps(config)  # a copy takes a third of the time of ``copy.deepcopy``
        self._groups = frozenset(groups())

    def with_values(self, overrides: Sequence[str]) -> DictConfig | None:
        """Return the config with plain values set as Hydra sets them.

        Args:
            overrides: What is to be set, added or removed.

        Returns:
            The config; None where Hydra itself is needed, for groups or to explain a mistake.
        """
        try:
            return self.set_values([parse(item) for item in overrides])
        except (ConfigError, HydraException, OmegaConfBaseException):
            return None

    def set_values(self, overrides: Sequence[Override]) -> DictConfig:
        """Return the config with plain values set as Hydra sets them.

        Raises:
            ConfigError: An override chooses from a group, or has several values.
            HydraException: What is to be changed or removed does not exist, or what is to be added does.
        """
        for item in overrides:
            if chooses_group(item, self._groups) or item.is_sweep_override():
                raise ConfigError(f"{item.input_line}: one plain value is needed here")
        changed: DictConfig = pickle.loads(self._content)
        ConfigLoaderImpl._apply_overrides_to_config(list(overrides), changed)
        return changed


def chooses_group(override: Override, names: Collection[str]) -> bool:
    """Whether an override chooses a YAML file of a group, and does not set a value.

    Args:
        override: The override.
        names: Names of the groups at the top.
    """
    key = override.key_or_group
    return bool(override.package) or "/" in key or key in names


def compose_locations(overrides: Sequence[str]) -> DictConfig:
    """Compose only what says where runs are, the output folder and the tracker, from the overrides that concern it.

    Raises:
        ConfigError: One of them has no meaning.
    """
    chosen = (item for item in overrides if root(item) in _LOCATIONS)
    return _compose_locations(Path.cwd(), tuple(with_trackers_beside(chosen)))


def with_trackers_beside(overrides: Iterable[str]) -> list[str]:
    """Return overrides that may set what a tracker beside the first has in a stored config, and not in today's."""
    return [f"++{item}" if _BESIDE.match(item) else item for item in overrides]


@cache
def _compose_locations(folder: Path, overrides: tuple[str, ...]) -> DictConfig:
    return compose_config(overrides)


def forget_locations() -> None:
    """Have ``compose_locations`` read the YAML files again: in a long process they may have changed."""
    _compose_locations.cache_clear()


def output_dir_of(overrides: Sequence[str]) -> str:
    """Return the output folder of a command line; Hydra composes only if the command line does not name one.

    Raises:
        ConfigError: An override has no meaning.
    """
    named = [item for item in overrides if full_name(item) == "output_dir"]
    found = Template(OmegaConf.create({"output_dir": "???"})).with_values(named[-1:]) if named else None
    return str((found or compose_locations(overrides)).output_dir)


def refuse_long_overrides(overrides: Sequence[str]) -> None:
    """Refuse an override that Hydra would parse for minutes: the time grows with the square of its length.

    Raises:
        ConfigError: There is one.
    """
    for item in overrides:
        if len(item) > _LONGEST_OVERRIDE:
            raise ConfigError(
                f"{item[:60]}…: the override has {len(item):,} characters, and may have {_LONGEST_OVERRIDE:,}. "
                "Put long values into a YAML file"
            )


def is_verbose(value: Any) -> bool:
    """Return what ``hydra.verbose`` says.

    Raises:
        ConfigError: It is neither true nor false.
    """
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ConfigError(f"true or false is needed, not {value}", path=VERBOSE)
    return text == "true"


def show_debugging(verbose: Any) -> None:
    """Let ``hydra.verbose=true`` show the tracebacks of mistakes, and what is logged for debugging; see ``is_verbose``.

    Args:
        verbose: Its value.
    """
    if is_verbose(verbose):
        logging.getLogger("ksuit_runner").setLevel(logging.DEBUG)


def without_sweep(config: DictConfig) -> DictConfig:
    """Return the config of a run, without what says how a sweep's runs are made and launched."""
    with open_dict(config):
        for name in NOT_STORED:
            config.pop(name, None)
    return config


def refuse_empty_mappings(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse ``trainer.parameter_rules={}``, which would leave the rules as they are: Hydra merges mappings.

    Args:
        config: The config with the overrides applied.
        overrides: The overrides.

    Raises:
        ConfigError: An empty mapping is given where there is one with something in it.
    """
    for item in overrides:
        name, is_empty = bare_name(item), re.fullmatch(r"\{\s*\}", value_text(item).strip())
        is_filled = item.startswith("+") and any(bare_name(other).startswith(f"{name}.") for other in overrides)
        if is_empty and not is_filled and (there := OmegaConf.select(config, name)):
            raise ConfigError(
                f"{item}: it would change nothing, as mappings are merged. {_instead_of_empty(name, there)}"
            )


def _instead_of_empty(name: str, there: Any) -> str:
    """Say what to write instead of an empty mapping at a config path where there is a filled one."""
    if name == "sweep":
        return "For none, write sweep=null"
    if name in groups():
        is_needed = name in OBJECT_SPECS and not OBJECT_SPECS[name].optional
        return f"For another, write {name}=NAME" if is_needed else f"For none, write {name}=[]"
    if "." not in name or root(name) == "hydra":  # a part of the config, which has to be there
        first = next((key for key in there if key != "_target_"), "KEY")
        return f"Set what is in it, such as {name}.{first}=VALUE"
    return f"For none, write {f'~{name}' if '_target_' in there else f'{name}=null'}"


def refuse_lost_overrides(overrides: Sequence[str]) -> None:
    """Refuse ``callbacks=[a] +callbacks=b``, of which Hydra would silently drop the second.

    Raises:
        ConfigError: A group is both chosen and appended to.
    """
    names = [full_name(item) for item in overrides]
    for group in groups():
        if group in names and f"+{group}" in names:
            raise ConfigError(f"{group}: given twice, as {group}= and +{group}=. Put both into one list")
