"""The file that a command writes about a run: ``export_to``."""

import os
from pathlib import Path

from ksuit_runner.errors import ConfigError


def target_file(export_to: str | None, default: str, suffix: str) -> Path:
    """Return the file or folder to write, which does not exist yet.

    Args:
        export_to: What the user has named; None for the default.
        default: Name of a file in the current folder.
        suffix: What its name has to end in; empty for anything.

    Raises:
        ConfigError: It ends in something else, exists, or would not be in a folder.
    """
    target = Path(os.path.expanduser(export_to or default)).absolute()
    if suffix and target.suffix != suffix:
        raise ConfigError(f"the name of the file has to end in {suffix}, and not be {target.name}", path="export_to")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}", path="export_to")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists, and is not overwritten. Remove it, or name another file", path="export_to")
    return target
