"""The folders of YAML files that a config is composed from: its groups, and the choices in each."""

import os
import re
from pathlib import Path
from shlex import quote
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from ksuit_runner.config.project_source import ProjectSource
from ksuit_runner.errors import ConfigError
from ksuit_runner.system.shipped_folders import shipped
from ksuit_runner.system.untrusted_files import SIZE_LIMIT

CONFIG_NAME = "config"
"""Name of the file that chooses from each group."""
_WRONG_NAMES = ("config", "configs", "cfg", "hydra")


def shipped_conf() -> Path:
    """Return the folder of the YAML files that ship."""
    return shipped("conf")


def project_conf() -> Path | None:
    """Return the project's own ``conf`` folder, if there is one in the working directory besides the shipped one."""
    folder = Path.cwd() / "conf"
    return folder if folder.is_dir() and not folder.samefile(shipped_conf()) else None


class ProjectConf(SearchPathPlugin):
    """Lets Hydra look into the project's own ``conf`` folder first, and read all files by ``ProjectSource``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put the project's folder before the shipped one."""
        for folder in reversed(_folders()):
            search_path.prepend("project", f"{ProjectSource.scheme()}://{folder}")


def register_search_path() -> None:
    """Register the project's own ``conf`` folder with Hydra.

    Raises:
        ConfigError: A YAML file is so large that reading it would take minutes.
    """
    for folder in _folders():
        for path in folder.rglob("*.yaml"):
            if path.is_file() and (size := path.stat().st_size) > SIZE_LIMIT:
                raise ConfigError(f"{path}: it has {size:,} bytes, and a config has at most {SIZE_LIMIT:,}")
    Plugins.instance().register(ProjectConf)
    Plugins.instance().register(ProjectSource)


def choices(group: str) -> list[str]:
    """Return the names of all YAML files of a group, shipped and own."""
    found = (path for folder in _folders() for path in (folder / group).glob("*.yaml"))
    return sorted({path.stem for path in found if path.is_file()})


def groups() -> list[str]:
    """Return the names of all groups, shipped and own."""
    return sorted({path.name for folder in _folders() for path in folder.iterdir() if path.is_dir()})


def files(name: str) -> list[Path]:
    """Return the YAML files of a name, such as ``model/mlp``: the project's own, which counts, and the shipped one."""
    return [path for folder in _folders() if (path := folder / f"{name}.yaml").is_file()]


def files_with(pattern: str) -> list[Path]:
    """Return the YAML files that have a line which matches, the project's own ones first."""
    found = [path for folder in _folders() for path in sorted(folder.rglob("*.yaml"))]
    line = re.compile(pattern, re.MULTILINE)
    return [path for path in found if path.is_file() and line.search(path.read_text("utf-8", errors="replace"))]


def _folders() -> list[Path]:
    return [folder for folder in (project_conf(), shipped_conf()) if folder is not None]


def hint_of_files(group: str, choice: str) -> str:
    """Say why a file is not found that the project seems to have, or nothing.

    Its ending or the name of its folder is another one, or the working directory is not the project's, but above or
    below it.
    """
    for folder in ("conf", *_WRONG_NAMES):
        for ending in (".yaml", ".yml"):
            path = Path(folder, group, f"{choice}{ending}")
            if (folder, ending) != ("conf", ".yaml") and path.is_file():
                return f"{path} has to be conf/{group}/{choice}.yaml"
    for around in folders_around():
        if os.path.isfile(around / "conf" / group / f"{choice}.yaml"):  # False, too, where one may not look
            return f"{around}/conf has it: cd {quote(str(around))}"
    return ""


def folders_around() -> list[Path]:
    """Return the folders above the working directory, and what is in it: where a command may have been meant to run."""
    here = Path.cwd()
    return [*here.parents, *(sorted(here.iterdir()) if os.access(here, os.R_OK) else [])]


def hint_of_choice(group: str, value: Any) -> str:
    """Say how the choice that a value names is written, to be appended to a message; nothing if it names none."""
    if not isinstance(value, str) or value not in choices(group):
        return ""
    return f". To choose conf/{group}/{value}.yaml in a file: `- override /{group}: {value}` among its defaults"
