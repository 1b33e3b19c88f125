"""Files that are whole after a crash: the old content or the new one, never something between."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a small file: after a crash it has the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would take up room
        raise
    sync(path.parent)


def sync(*paths: Path) -> None:
    """Wait until the content of files, and the entries of folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
