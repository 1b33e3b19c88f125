"""The package of callbacks, which a project's own folder adds to, also where that folder is a package of its own.

Python joins folders of one name on its path to a namespace package only if none of them has an ``__init__.py``; of a
project that has one, or a ``callbacks.py``, the callbacks that ship would be hidden.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

NAME = "callbacks"


def folders() -> list[str]:
    """Return all folders of the package, the project's own before the one that ships."""
    places = [Path(entry or os.getcwd()) / NAME for entry in sys.path]
    return list(dict.fromkeys(str(place) for place in places if place.is_dir()))


def join() -> None:
    """Import the package, and let its modules be found in all of its folders.

    Raises:
        Exception: What importing the project's own package raises.
    """
    package = import_module(NAME)
    known = list(getattr(package, "__path__", ()))
    missing = [folder for folder in folders() if folder not in known]
    if missing:
        package.__path__ = [*known, *missing]
