"""The parts of a page of HTML that needs no other file. What is shown is escaped, with passwords masked."""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from ksuit_runner.security.masking import mask_text
from ksuit_runner.ui.figure_text import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd } img, svg { max-width: 100% }
table { border-collapse: collapse } th, td { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top }
th { font-weight: 600 } td + td { overflow-wrap: anywhere } tr + tr td { border-top: 1px solid #eee }
pre { background: #f6f6f6; padding: 1rem; overflow: auto } figure { display: inline-block; margin: 0 1rem 1rem 0 }
figcaption { color: #666; font-size: 13px } summary { cursor: pointer; color: #666 }
"""


def document(title: str, sections: Mapping[str, str]) -> str:
    """Return a page: what is below each heading is HTML, and a section without anything is left out."""
    body = "".join(f"<h2>{text(head)}</h2>\n{content}\n" for head, content in sections.items() if content)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
        f"<style>\n{_STYLE}</style></head>\n<body><h1>{text(title)}</h1>\n{body}</body></html>\n"
    )


def text(content: str) -> str:
    """Return a text as HTML."""
    return escape(mask_text(content))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, with a line of heads if there are any; nothing if it has no rows."""
    lines = ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    first = ["".join(f"<th>{text(head)}</th>" for head in heads)] if heads else []
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in [*first, *lines]) + "</table>"


def folded(summary: str, content: str) -> str:
    """Return HTML that is shown on a click; nothing for nothing."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>" if content else ""


def image(content: bytes, kind: str, label: str) -> str:
    """Return a picture.

    Args:
        content: The file.
        kind: The type of the file: ``png`` or ``svg+xml``.
        label: What is said in its place.
    """
    return f'<img alt="{text(label)}" src="data:image/{kind};base64,{b64encode(content).decode()}">'


def drawing(figure: "Figure | None", label: str) -> str:
    """Return a figure as a picture; nothing if there is none."""
    if figure is None:
        return ""
    content = BytesIO()
    save_figure(figure, content, format="svg", metadata={"Date": None})
    return image(content.getvalue(), "svg+xml", label)
