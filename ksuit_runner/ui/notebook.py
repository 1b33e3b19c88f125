"""What a run shows in a notebook: a bar that is redrawn in place, as on a terminal, and a picture."""

import logging
import sys
from base64 import b64encode
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

_LOGGER = logging.getLogger(__name__)
_WIDTH = 100
_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; IPython on a terminal is not one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookView:
    """Shows what rich renders below a cell and replaces it in place, as ``rich.live.Live`` does on a terminal.

    That of rich needs widgets in a notebook. Displays of IPython need no other package, every front end shows them, and
    the last one stays in the saved notebook. If it cannot be shown that is a warning, and the view stays as it is.

    Attributes:
        is_started: Whether it is shown.
    """

    def __init__(self) -> None:
        self.is_started = False
        self._handle: Any = None
        self._is_broken = False

    def start(self) -> None:
        """Begin to show what ``update`` is given."""
        self.is_started = True

    def update(self, renderable: RenderableType, *, refresh: bool = True) -> None:
        """Replace what is shown; at once, whatever ``refresh`` says."""
        if self._is_broken:
            return
        console = Console(
            file=StringIO(),
            record=True,
            width=_WIDTH,
            force_terminal=True,
            color_system="truecolor",
            force_jupyter=False,
        )
        console.print(renderable)
        html = console.export_html(code_format=_HTML, inline_styles=True, clear=False)
        try:
            self._handle = _show(self._handle, {"text/plain": console.export_text(), "text/html": html})
        except Exception as error:  # of the connection to the browser, say
            self._is_broken = True
            _LOGGER.warning("the notebook does not show progress any more: %r", error)

    def stop(self) -> None:
        """Leave what is shown as it is."""
        self.is_started = False


class NotebookPicture:
    """A picture below a cell, which is replaced in place.

    Args:
        run_id: The run whose metrics it shows.
    """

    _last: tuple[str, int] | None = None

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._handle: Any = None

    @property
    def is_shown(self) -> bool:
        """Whether there is one."""
        return self._handle is not None

    def show(self, content: bytes) -> None:
        """Show a PNG in place of the one before."""
        shown = {"text/plain": "curves of the metrics", "image/png": b64encode(content).decode()}
        self._handle = _show(self._handle, shown)
        NotebookPicture._last = (self._run_id, _cell())

    @classmethod
    def is_below_cell(cls, run_id: str) -> bool:
        """Whether the cell that is executed shows the picture of a run."""
        return cls._last is not None and cls._last == (run_id, _cell())


def _cell() -> int:
    """Return the number of the cell that is executed."""
    from IPython import get_ipython

    return getattr(get_ipython(), "execution_count", 0)


def _show(handle: Any, shown: dict[str, str]) -> Any:
    """Show something in place of what a handle stands for, if there is one, and return the handle."""
    from IPython.display import display

    if handle is None:
        return display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    handle.update(shown, raw=True)
    return handle


def live_view(console: Console) -> Live | NotebookView | None:
    """Return what shows a bar, on a terminal or in a notebook; None where nothing can be redrawn, or is to be shown."""
    if console.quiet:
        return None
    if in_notebook():  # some kernels say that they are a terminal, but nothing that is printed there can be redrawn
        return NotebookView()
    return Live(console=console, auto_refresh=False) if console.is_interactive else None
