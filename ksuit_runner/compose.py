"""Composing a run's config with Hydra: where YAML files are found, and mistakes said in the user's words."""

import copy
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ksuit_runner.errors import ConfigError, suggest
from ksuit_runner.override_text import root
from ksuit_runner.stored_files import SIZE_LIMIT

CONFIG_NAME = "config"
MISTAKES = (HydraException, OmegaConfBaseException, RecursionError)
"""What Hydra raises for a user's mistake; ``explain`` says it in the user's words."""
_PLACES = ("output_dir", "tracker")
_LONGEST_OVERRIDE = 20_000
_WIDEST = 500  # characters of a line that explains a mistake
SWEEP_NODES = ("sweep", "launcher")
"""Places of the config that are about a sweep and not about its runs."""


def shipped_conf() -> Path:
    """Return the folder of the YAML files that ship: in the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


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
    """Make Hydra know the project's own folder.

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
            return compose(CONFIG_NAME, overrides=list(overrides))
    except Exception as error:  # nothing but Hydra runs here, and it does not wrap all that its parser raises
        raise explain(error, overrides) from None


def with_values(config: DictConfig, overrides: Sequence[str]) -> DictConfig | None:
    """Return a copy of a composed config with plain values set as Hydra sets them, in 5 ms instead of 100.

    Args:
        config: A config as Hydra has composed it.
        overrides: What is to be set.

    Returns:
        The config; None where it takes Hydra itself, for groups, for keys that are new or go, and to explain a mistake.
    """
    changed = copy.deepcopy(config)
    parser, known_groups = OverridesParser.create(), groups()
    try:
        for item in overrides:
            override = parser.parse_override(item)
            is_plain = override.type is OverrideType.CHANGE and not (override.package or override.is_sweep_override())
            if not is_plain or override.key_or_group in known_groups:
                return None
            OmegaConf.update(changed, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException):
        return None
    return changed


def compose_places(overrides: Sequence[str]) -> DictConfig:
    """Compose only what says where runs are, their folder and their tracker, by the overrides that are about that.

    Raises:
        ConfigError: One of them has no meaning.
    """
    chosen = (item for item in overrides if root(item) in _PLACES)
    return _compose_places(Path.cwd(), tuple(chosen))


@cache
def _compose_places(folder: Path, overrides: tuple[str, ...]) -> DictConfig:
    return compose_config(overrides)


def output_dir_of(overrides: Sequence[str]) -> str:
    """Return the output folder that a command line means; Hydra has to compose only if it does not name one itself.

    Raises:
        ConfigError: An override has no meaning.
    """
    named = [item for item in overrides if item.startswith("output_dir=")]
    found = with_values(OmegaConf.create({"output_dir": "???"}), named[-1:]) if named else None
    return str((found or compose_places(overrides)).output_dir)


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
    """Return the config of a run: what says how a sweep's runs are made and launched is no part of it."""
    with open_dict(config):
        for name in SWEEP_NODES:
            config.pop(name, None)
    return config


def refuse_lost_overrides(overrides: Sequence[str]) -> None:
    """Refuse ``callbacks=[a] +callbacks=b``, of which Hydra would silently drop the second.

    Raises:
        ConfigError: A group is both chosen and appended to.
    """
    names = [item.partition("=")[0] for item in overrides]
    for group in groups():
        if group in names and f"+{group}" in names:
            raise ConfigError(f"{group}: it is given twice, as {group}= and +{group}=. Put both into one list")


def choices(group: str) -> list[str]:
    """Return the names of all YAML files of a group, shipped and own."""
    folders = [folder / group for folder in (project_conf(), shipped_conf()) if folder is not None]
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


def groups() -> list[str]:
    """Return the names of all groups, shipped and own."""
    folders = [folder for folder in (project_conf(), shipped_conf()) if folder is not None]
    return sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Say in the user's words what Hydra could not do, with the nearest valid name.

    Args:
        error: What Hydra raised.
        overrides: The overrides that were given.
    """
    lines = str(_explained(error, overrides)).splitlines()
    return ConfigError("\n".join(line if len(line) <= _WIDEST else f"{line[:_WIDEST]}…" for line in lines))


def _explained(error: Exception, overrides: Sequence[str]) -> ConfigError:
    if isinstance(error, RecursionError):
        return ConfigError("an override or a YAML file is nested too deep")
    text = str(error)
    missing = re.search(r"Could not find '([^']+)'|Could not load '([^']+)'", text)
    if missing:
        return _unknown_choice(missing[1] or missing[2])
    key = re.search(r"Key '([^']+)' is not in struct|Could not override '([^']+)'", text)
    if key:
        return _unknown_key(text, overrides)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ConfigError("\n".join(lines[:4]) or type(error).__name__)


def _unknown_choice(path: str) -> ConfigError:
    group, _, choice = path.rpartition("/")
    if not group:
        return ConfigError(f"there is no config '{choice}'. {suggest(choice, groups())}")
    if group not in groups():
        return ConfigError(f"{path}: there is no group '{group}'. {suggest(group, groups())}")
    available = choices(group)
    hint = suggest(choice, available)
    listed = f"\nThere are: {', '.join(available)}" if "Did you mean" in hint else ""
    return ConfigError(f"{group}: there is no '{choice}'. {hint}{listed}")


def _unknown_key(text: str, overrides: Sequence[str]) -> ConfigError:
    full = re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", text)
    place = full[1] if full else ""
    given = next((item for item in overrides if item.lstrip("+~").split("=")[0] == place), place)
    parent, _, name = place.rpartition(".")
    valid = _keys_at(parent, [item for item in overrides if item != given])
    where = f"'{parent}' has" if parent else "the config has"
    return ConfigError(f"{given}: {where} no '{name}'. {suggest(name, valid)}\nTo add a new key, write +{given}")


def _keys_at(place: str, overrides: Sequence[str]) -> list[str]:
    """Return the keys below a place of the config that the other overrides make."""
    group_choices = [item for item in overrides if "." not in item.split("=")[0]]
    with initialize_config_dir(str(shipped_conf()), version_base="1.3"):
        try:
            config = compose(CONFIG_NAME, overrides=group_choices)
        except (HydraException, OmegaConfBaseException):
            return []
    node = OmegaConf.select(config, place) if place else config
    return [str(key) for key in node] if isinstance(node, DictConfig) else []
