"""Makes a small project of one's own, to begin with: ``init FOLDER``."""

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from ksuit_runner.config.overrides import allow_only
from ksuit_runner.errors import ConfigError, files_explained
from ksuit_runner.system.shipped_folders import shipped
from ksuit_runner.ui.terminal import make_console


def init(query: str, overrides: Sequence[str]) -> int:
    """Copy the example ``spirals`` into a folder: a dataset, a network, a callback, their YAML files, and a test.

    Args:
        query: The folder, which is made if it does not exist. Hidden files, such as ``.git``, stay.
        overrides: The command line, which says nothing else.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: The folder has more than hidden files in it, or is a file.
    """
    allow_only(overrides, "init")
    folder = Path(os.path.expanduser(query))
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if (folder.exists() and not folder.is_dir()) or not all(name.startswith(".") for name in there):
        raise ConfigError(f"init {query}: it exists and is not an empty folder. Nothing is overwritten: name another")
    made: list[str] = []

    def copy(source: str, target: str) -> str:
        made.append(str(Path(target).relative_to(folder)))
        with files_explained(target):  # at the first one: copytree would go on, and tell all errors at once
            Path(target).write_bytes(Path(source).read_bytes())
        return target

    without = shutil.ignore_patterns("__pycache__", "outputs", ".pytest_cache", *there)
    shutil.copytree(shipped("examples") / "spirals", folder, ignore=without, copy_function=copy, dirs_exist_ok=True)
    console = make_console()
    console.print(f"{folder}: {', '.join(sorted(made))}", soft_wrap=True)
    change = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))}\n"
    console.print(f"\n{change}ksuit-runner experiment=spirals", soft_wrap=True)
    console.print("\nREADME.md there has more.")
    return 0
