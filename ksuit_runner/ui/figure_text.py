"""Text in figures of matplotlib."""

import warnings
from typing import Any


def literal(text: str) -> str:
    """Return a text so that matplotlib draws it as it is: between two dollars is a formula, perhaps a wrong one."""
    return text.replace("$", r"\$")


def save_figure(figure: Any, target: Any, **options: Any) -> None:
    """Save a figure to a path or a stream; characters that its font lacks become boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(target, **options)
