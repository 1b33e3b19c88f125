"""What a run shows in a notebook: a bar that is redrawn in place, as on a terminal."""

import sys
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

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
    the last one stays in the saved notebook.

    Attributes:
        is_started: Whether it is shown.
    """

    def __init__(self) -> None:
        self.is_started = False
        self._handle: Any = None

    def start(self) -> None:
        """Begin to show what ``update`` is given."""
        self.is_started = True

    def update(self, renderable: RenderableType, *, refresh: bool = True) -> None:
        """Replace what is shown; at once, whatever ``refresh`` says."""
        from IPython.display import display

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
        shown = {"text/plain": console.export_text(), "text/html": html}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)

    def stop(self) -> None:
        """Leave what is shown as it is."""
        self.is_started = False


def live_view(console: Console) -> Live | NotebookView | None:
    """Return what shows a bar, on a terminal or in a notebook; None where nothing can be redrawn, or is to be shown."""
    if console.quiet:
        return None
    if in_notebook():  # some kernels say that they are a terminal, but nothing that is printed there can be redrawn
        return NotebookView()
    return Live(console=console, auto_refresh=False) if console.is_interactive else None
