"""Finds the folders that ship beside the code: ``conf``, and ``callbacks``, which a project extends.

Both lie in the folder of the repository in a clone, and inside ``ksuit_runner`` where a wheel is installed. As a
top-level package in site-packages, it could be overwritten or hidden by another distribution's ``callbacks``.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

NAME = "callbacks"
INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Folders of installed packages, which hold nothing of the project."""
_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Return a folder that ships, inside the installed package or beside it in a clone."""
    inside = _PACKAGE / "_shipped" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


class CallbacksFinder:
    """Finds the package ``callbacks`` and its modules: in the project first, then what ships, then what is installed.

    Python joins folders of one name to a namespace package only where none of them has an ``__init__.py``; a project
    that has one, or a ``callbacks.py``, would hide the callbacks that ship. The project is every entry of ``sys.path``
    that is not a folder of installed packages, as they are at the time of an import.
    """

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Return where a module is, if it is the package or directly below it."""
        if name.rpartition(".")[0] == NAME:
            return PathFinder.find_spec(name, cls.folders())
        if name != NAME:
            return None
        # A project's callbacks.py becomes a package, too.
        spec = PathFinder.find_spec(NAME, cls._entries(installed=False)) or ModuleSpec(NAME, None)
        spec.submodule_search_locations = cls.folders()
        return spec

    @classmethod
    def folders(cls) -> list[str]:
        """Return all folders of the package, in the order in which they are searched."""
        own, others = ([Path(entry) / NAME for entry in cls._entries(flag)] for flag in (False, True))
        folders = [*own, shipped(NAME), *others]
        return list(dict.fromkeys(str(folder) for folder in folders if folder.is_dir()))

    @staticmethod
    def _entries(installed: bool) -> list[str]:
        entries = [entry or os.getcwd() for entry in sys.path]
        return [entry for entry in entries if installed != INSTALLED.isdisjoint(Path(entry).parts)]


def install() -> None:
    """Make the finder the first one, also for a package that is already imported."""
    if CallbacksFinder not in sys.meta_path:
        sys.meta_path.insert(0, CallbacksFinder)
    if NAME in sys.modules:
        sys.modules[NAME].__path__ = CallbacksFinder.folders()
