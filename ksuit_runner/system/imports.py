"""Imports without Python's garbage collector, which goes through all that is imported, again and again, for nothing.

An import of torch or MLflow takes an eighth less time without it. In a process of our own the collector leaves alone
for good what was imported; else each of its full rounds takes about 75 ms, some of them during training.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_owns_process = False


def own_process() -> None:
    """Say that this process is a command or a part of one, and no program of the user's, whose garbage is its own."""
    global _owns_process
    _owns_process = True


@contextmanager
def quick_imports(before_runs: bool = False) -> Iterator[None]:
    """Run a block that imports much, and makes no garbage that is worth collecting.

    Args:
        before_runs: Whether nothing of a run is there yet. Only then what was imported is left alone for good: with it,
            whatever else is there would stay, such as the model and the data of the first job of a sweep.
    """
    is_enabled, count = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if before_runs and _owns_process and len(sys.modules) > count:
            gc.freeze()
        if is_enabled:
            gc.enable()
