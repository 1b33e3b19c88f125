"""Files that are whole after a crash: the old content or the new one, never something between."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a small file: after a crash it has the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk it would take up room
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
