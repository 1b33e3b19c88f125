"""Composes a run's config with Hydra, and explains Hydra's errors in the user's words."""

import copy
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ksuit_runner.config.overrides import bare_name, full_name, parse, root
from ksuit_runner.errors import ConfigError, did_you_mean, suggest
from ksuit_runner.system.shipped_folders import shipped
from ksuit_runner.system.untrusted_files import SIZE_LIMIT

CONFIG_NAME = "config"
MISTAKES = (HydraException, OmegaConfBaseException, RecursionError)
"""What Hydra raises for a user's mistake; ``explain`` puts it into the user's words."""
_LOCATIONS = ("output_dir", "tracker", "trust")
_BESIDE = re.compile(r"tracker\.[\w-]+\.")
_LONGEST_OVERRIDE = 20_000
_WIDEST = 500  # characters of a line that explains a mistake
SWEEP_NODES = ("sweep", "launcher")
"""Keys at the top of the config that are about a sweep and not about its runs."""
ASKS_HYDRA = re.compile(r"\$\{\s*hydra:")
"""An interpolation of Hydra's own config, which resolves only in the config that Hydra composed last."""
COMMAND_KEYS = ("resume", "fork", "evaluate", "sync", "list", "show", "compare", "export", "export_to", "leaderboard")
"""Keys at the top of the config that ask for something else than a new run."""
NOT_STORED = (*SWEEP_NODES, *COMMAND_KEYS, "trust")
"""Keys at the top of the config that are not stored with a run."""


def shipped_conf() -> Path:
    """Return the folder of the YAML files that ship."""
    return shipped("conf")


def project_conf() -> Path | None:
    """Return the project's own ``conf`` folder, if there is one in the working directory besides the shipped one."""
    folder = Path.cwd() / "conf"
    return folder if folder.is_dir() and not folder.samefile(shipped_conf()) else None


class ProjectConf(SearchPathPlugin):
    """Lets Hydra look into the project's own ``conf`` folder first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put the project's folder before the shipped one."""
        folder = project_conf()
        if folder is not None:
            search_path.prepend(provider="project", path=f"file://{folder}", anchor="main")


def register_search_path() -> None:
    """Register the project's own ``conf`` folder with Hydra.

    Raises:
        ConfigError: A YAML file is so large that reading it would take minutes.
    """
    for folder in filter(None, (project_conf(), shipped_conf())):
        for path in folder.rglob("*.yaml"):
            if path.is_file() and (size := path.stat().st_size) > SIZE_LIMIT:
                raise ConfigError(f"{path}: it has {size:,} bytes, and a config has at most {SIZE_LIMIT:,}")
    Plugins.instance().register(ProjectConf)


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose a config as the command line does.

    Args:
        overrides: Overrides in Hydra's grammar.

    Raises:
        ConfigError: An override names nothing that exists, or has no meaning.
    """
    refuse_long_overrides(overrides)
    register_search_path()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(shipped_conf()), version_base="1.3"):
            return _without_hydra(compose(CONFIG_NAME, overrides=list(overrides), return_hydra_config=True))
    except Exception as error:  # only Hydra runs here, and it does not wrap everything that its parser raises
        raise explain(error, overrides) from None


def _without_hydra(config: DictConfig) -> DictConfig:
    """Remove Hydra's own node from a config; ``${hydra:...}`` resolves from now on as it does in a run."""
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = os.path.abspath(config.hydra.run.dir)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def with_values(config: DictConfig, overrides: Sequence[str]) -> DictConfig | None:
    """Return a copy of a composed config with plain values set as Hydra sets them, in 5 ms instead of 100.

    Args:
        config: A config as Hydra has composed it.
        overrides: What is to be set, added or removed.

    Returns:
        The config; None where Hydra itself is needed, for groups or to explain a mistake.
    """
    try:
        return set_values(config, [parse(item) for item in overrides])
    except (ConfigError, HydraException, OmegaConfBaseException):
        return None


def set_values(config: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """Return a copy of a composed config with plain values set as Hydra sets them.

    Raises:
        ConfigError: An override chooses from a group, or has several values.
        HydraException: What is to be changed or removed does not exist, or what is to be added does.
    """
    for item in overrides:
        if chooses_group(item) or item.is_sweep_override():
            raise ConfigError(f"{item.input_line}: one plain value is needed here")
    changed = copy.deepcopy(config)
    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), changed)
    return changed


def chooses_group(override: Override) -> bool:
    """Whether an override chooses a YAML file of a group, and does not set a value."""
    key = override.key_or_group
    return bool(override.package) or "/" in key or key in groups()


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
    found = with_values(OmegaConf.create({"output_dir": "???"}), named[-1:]) if named else None
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


def without_sweep(config: DictConfig) -> DictConfig:
    """Return the config of a run, without what says how a sweep's runs are made and launched."""
    with open_dict(config):
        for name in NOT_STORED:
            config.pop(name, None)
    return config


def refuse_lost_overrides(overrides: Sequence[str]) -> None:
    """Refuse ``callbacks=[a] +callbacks=b``, of which Hydra would silently drop the second.

    Raises:
        ConfigError: A group is both chosen and appended to.
    """
    names = [full_name(item) for item in overrides]
    for group in groups():
        if group in names and f"+{group}" in names:
            raise ConfigError(f"{group}: given twice, as {group}= and +{group}=. Put both into one list")


def choices(group: str) -> list[str]:
    """Return the names of all YAML files of a group, shipped and own."""
    folders = [folder / group for folder in (project_conf(), shipped_conf()) if folder is not None]
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


def groups() -> list[str]:
    """Return the names of all groups, shipped and own."""
    folders = [folder for folder in (project_conf(), shipped_conf()) if folder is not None]
    return sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})


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
    missing = re.search(r"Could not find '([^']+)'|Could not load '([^']+)'", text)
    if missing:
        return _unknown_choice(missing[1] or missing[2])
    key = re.search(r"Key '([^']+)' is not in struct|Could not override '([^']+)'", text)
    if key:
        return _unknown_key(f"{text}\n{error.__cause__ or ''}", overrides, config)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ConfigError("\n".join(lines[:4]) or type(error).__name__)


def _unknown_choice(path: str) -> ConfigError:
    group, _, choice = path.rpartition("/")
    if not group:
        return ConfigError(f"there is no config '{choice}'. {did_you_mean(choice, groups())}")
    available = choices(group)
    if not available and group not in groups():
        return ConfigError(f"{path}: there is no group '{group}'. {did_you_mean(group, groups())}")
    listed = f"\nThere are: {', '.join(available)}" if suggest(choice, available) else ""
    return ConfigError(f"{group}: there is no '{choice}'. {did_you_mean(choice, available)}{listed}")


def _unknown_key(text: str, overrides: Sequence[str], config: DictConfig | None) -> ConfigError:
    full = re.search(r"full_key: (.+)", text) or re.search(r"Could not override '([^']+)'", text)
    path = full[1].strip() if full else ""
    about = [item for item in overrides if f"{path}.".startswith(f"{bare_name(item)}.")]
    given = max(about, key=lambda item: len(bare_name(item)), default=path)
    parent, _, name = path.rpartition(".")
    if config is None:
        config = _groups_chosen([item for item in overrides if item != given])
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig | None):
        return ConfigError(f"{given}: '{parent}' is a value and has no keys")
    where = f"'{parent}' has" if parent else "the config has"
    how = f"To add a new key, write +{given}"
    if bare_name(given) in groups():
        how += f". To replace what is there, write a file in conf/{bare_name(given)}/ and choose it"
    return ConfigError(f"{given}: {where} no '{name}'. {did_you_mean(name, map(str, node or {}))}\n{how}")


def _groups_chosen(overrides: Sequence[str]) -> DictConfig:
    """Return the config that the group choices among some overrides compose, an empty one if they do not compose."""
    with initialize_config_dir(str(shipped_conf()), version_base="1.3"):
        try:
            return compose(CONFIG_NAME, overrides=[item for item in overrides if "." not in bare_name(item)])
        except (HydraException, OmegaConfBaseException):
            return OmegaConf.create()
