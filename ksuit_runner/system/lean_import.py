"""Imports a package without what it imports only where that happens to be installed, in a process of our own."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_is_allowed = False


def allow(is_allowed: bool) -> None:
    """Say whether it is allowed: no code of the user's runs in this process, which could miss something later."""
    global _is_allowed
    _is_allowed = is_allowed


def import_without(optional: tuple[str, ...], module: str) -> ModuleType:
    """Import a module as if packages that it can do without were not installed, where that is allowed.

    Args:
        optional: Names of these packages. Whoever imports them later gets them.
        module: Full name of the module.
    """
    package = module.partition(".")[0]
    if not _is_allowed or package in sys.modules:
        return importlib.import_module(module)
    try:
        with _hidden(optional):
            return importlib.import_module(module)
    except ImportError:  # a version that cannot do without them
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        return importlib.import_module(module)


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: it cannot be imported
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
