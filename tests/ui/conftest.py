"""A console whose output can be read."""

import io
import sys

import pytest
from rich.console import Console

from ksuit_runner.ui.terminal import make_console


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """The console of a process whose output goes into a file."""
    for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        console = make_console()
    console.file = io.StringIO()
    return console
