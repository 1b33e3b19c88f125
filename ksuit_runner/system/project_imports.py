"""Imports of the project's own modules, where the program is no command but a script or a notebook."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def project_imports() -> Iterator[None]:
    """Import from the working directory, as ``python -m`` does, and from changed files; restore the path after."""
    importlib.invalidate_caches()
    path = sys.path[:]
    if not {"", os.getcwd()} & {*path}:
        sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = path
