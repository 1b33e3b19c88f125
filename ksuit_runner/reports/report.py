"""One run as one page of HTML that needs no other file: ``report=RUN``."""

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from ksuit_runner.config.overrides import allow_only, value_of
from ksuit_runner.config.stored_config import format_config
from ksuit_runner.reports.curves import curves
from ksuit_runner.reports.facts import StoredRun
from ksuit_runner.reports.show import TAKES, changes_of_defaults, commands, head
from ksuit_runner.reports.target_file import target_file
from ksuit_runner.resume.request import find_stored
from ksuit_runner.security.masking import mask_config, mask_text
from ksuit_runner.system.atomic_files import write_text
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_file, open_to_read
from ksuit_runner.ui.terminal import format_number, make_console

_SUFFIX = ".html"
_MOST_PICTURES = 24
_LARGEST_PICTURE = 2_000_000  # bytes
_PICTURES = ("images", "figures")
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd } img, svg { max-width: 100% }
table { border-collapse: collapse } th, td { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top }
th { font-weight: 600 } td { overflow-wrap: anywhere } tr + tr td { border-top: 1px solid #eee }
pre { background: #f6f6f6; padding: 1rem; overflow: auto } figure { display: inline-block; margin: 0 1rem 1rem 0 }
figcaption { color: #666; font-size: 13px } summary { cursor: pointer; color: #666 }
"""


def report(query: str, overrides: Sequence[str]) -> int:
    """Write the page to ``export_to``, by default ``RUN_ID.html`` in the current folder.

    It has what the run was and found: curves and values of its metrics, checkpoints, pictures, config, environment, and
    the commands that continue it; passwords and tokens are masked.

    Args:
        query: The run.
        overrides: The command line; besides the run it may say where it is, and where to write.

    Returns:
        The exit status, 0.

    Raises:
        KsuitError: There is no such run, what is stored of it is damaged, or the file exists.
    """
    allow_only(overrides, "report", *TAKES, "export_to")
    run = StoredRun(find_stored("report", query, overrides).paths)
    target = target_file(value_of("export_to", overrides), run.paths.run_id + _SUFFIX, _SUFFIX)
    write_text(target, page(run))
    make_console().print(f"report of {run.name}: {target}", soft_wrap=True, markup=False)
    return 0


def page(run: StoredRun) -> str:
    """Return the page of a run."""
    rows = {
        key: (
            format_number(item.last),
            "" if item.best is None else format_number(item.best),
            str(item.best_step or ""),
        )
        for key, item in run.metrics.items()
    }
    sections = {
        "Run": _table((), head(run).items()),
        "Curves": _curves(run),
        "Metrics": _table(("metric", "last", "best", "at update"), [(key, *cells) for key, cells in rows.items()]),
        "Checkpoints": _table(
            ("checkpoint", "tags"), [(name, " ".join(tags)) for name, tags in run.checkpoints.items()]
        ),
        "Pictures": "".join(_pictures(run)),
        "Config": _table(("differs from the default config", "default", "this run"), changes_of_defaults(run))
        + _folded("all of it", f"<pre>{_text(format_config(mask_config(run.config)))}</pre>"),
        "Environment": _folded(
            "code, packages and machine", _table((), [(key, str(value)) for key, value in run.environment.items()])
        ),
        "Commands": _table((), commands(run).items()),
    }
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections.items() if content)
    title = _text(run.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>\n{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}</body></html>\n"
    )


def _text(text: str) -> str:
    return escape(mask_text(text))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    first = ["".join(f"<th>{escape(text)}</th>" for text in heads)] if heads else []
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in [*first, *lines]) + "</table>"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>" if content else ""


def _curves(run: StoredRun) -> str:
    points: Mapping[str, Mapping[int, float]] = run.points
    keys = [key for key, values in points.items() if len(set(values.values())) > 1]
    if (figure := curves([run.name], [points], keys)) is None:
        return ""
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return _image(content.getvalue(), "svg+xml", "curves of the metrics")


def _pictures(run: StoredRun) -> Iterator[str]:
    """Yield the newest picture of each key."""
    newest: dict[str, Path] = {}
    for kind in _PICTURES:
        folder = run.paths.artifacts_dir / kind
        for path in sorted(folder.rglob("*.png")):
            name = path.relative_to(folder)
            key = name.name.partition("+")[0].replace("~", "/") if len(name.parts) == 1 else str(name.parent)
            step = _step(path)
            if key not in newest or step >= _step(newest[key]):
                newest[key] = path
    for key, path in list(newest.items())[:_MOST_PICTURES]:
        try:
            if check_file(path, run.paths.runs_dir) > _LARGEST_PICTURE:
                continue
            with open_to_read(path) as file:
                content = file.read(_LARGEST_PICTURE)
        except (UnsafeFileError, OSError):
            continue
        caption = _text(f"{key}, update {_step(path)}")
        yield f"<figure>{_image(content, 'png', key)}<figcaption>{caption}</figcaption></figure>"


def _step(path: Path) -> int:
    text = path.name.partition("+step+")[2].partition("+")[0] or path.stem
    return int(text) if text.isdecimal() else 0


def _image(content: bytes, kind: str, text: str) -> str:
    return f'<img alt="{_text(text)}" src="data:image/{kind};base64,{b64encode(content).decode()}">'
