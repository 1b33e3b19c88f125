"""Makes a small project of one's own, to begin with: ``init FOLDER``."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from ksuit_runner.config.overrides import allow_only
from ksuit_runner.errors import ConfigError
from ksuit_runner.system.shipped_folders import shipped
from ksuit_runner.ui.terminal import make_console


def init(query: str, overrides: Sequence[str]) -> int:
    """Copy the example ``spirals`` into a folder: a dataset, a network, a callback, their YAML files, and a test.

    Args:
        query: The folder, which is made if it does not exist.
        overrides: The command line, which says nothing else.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: The folder has something in it, or is a file.
    """
    allow_only(overrides, "init")
    folder = Path(query).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"init {query}: it exists and is not an empty folder. Nothing is overwritten: name another")
    without = shutil.ignore_patterns("__pycache__", "outputs", ".pytest_cache")
    shutil.copytree(shipped("examples") / "spirals", folder, ignore=without, dirs_exist_ok=True)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    console = make_console()
    console.print(f"{folder}: {', '.join(files)}", soft_wrap=True)
    console.print(f"\ncd {shlex.quote(str(folder))}\nksuit-runner experiment=spirals", soft_wrap=True)
    console.print("\nREADME.md there has more.")
    return 0
