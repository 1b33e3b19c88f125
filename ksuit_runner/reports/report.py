"""A run or a sweep as one page of HTML that needs no other file: ``report=RUN``."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ksuit_runner.config.overrides import allow_only, value_of
from ksuit_runner.config.stored_config import format_config
from ksuit_runner.reports.curves import curves
from ksuit_runner.reports.facts import StoredRun
from ksuit_runner.reports.html import document, drawing, folded, image, table, text
from ksuit_runner.reports.show import TAKES, changes_of_defaults, commands, head
from ksuit_runner.reports.target_file import target_file
from ksuit_runner.resume.request import find_stored
from ksuit_runner.security.masking import mask_config
from ksuit_runner.sweep.stored_sweep import find_sweep
from ksuit_runner.system.atomic_files import write_text
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_file, open_to_read
from ksuit_runner.ui.formats import format_number
from ksuit_runner.ui.terminal import make_console

_SUFFIX = ".html"
_MOST_PICTURES = 24
_LARGEST_PICTURE = 2_000_000  # bytes
_PICTURES = ("images", "figures")


def report(query: str, overrides: Sequence[str]) -> int:
    """Write the page to ``export_to``, by default ``RUN_ID.html`` in the current folder.

    Of a run it has what it was and found: curves and values of its metrics, checkpoints, pictures, config, environment,
    and the commands that continue it; of a sweep see ``sweep_page``. Passwords and tokens are masked.

    Args:
        query: The run, or the sweep.
        overrides: The command line; besides the run it may say where it is, and where to write.

    Returns:
        The exit status, 0.

    Raises:
        KsuitError: There is no such run, what is stored of it is damaged, or the file exists.
    """
    allow_only(overrides, "report", *TAKES, "export_to")
    if (sweep := find_sweep(query, overrides)) is not None:
        from ksuit_runner.reports.sweep_page import sweep_page
        from ksuit_runner.sweep.commands import read_leaderboard

        plan, board = read_leaderboard(sweep, overrides)
        id_, name, content = sweep.sweep_id, plan.name, sweep_page(sweep, plan, board)
    else:
        run = StoredRun(find_stored("report", query, overrides).paths)
        id_, name, content = run.paths.run_id, run.name, page(run)
    target = target_file(value_of("export_to", overrides), id_ + _SUFFIX, _SUFFIX)
    write_text(target, content)
    make_console().print(f"report of {name}: {target}", soft_wrap=True, markup=False)
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
        "Run": table((), head(run).items()),
        "Curves": _curves(run),
        "Metrics": table(("metric", "last", "best", "at update"), [(key, *cells) for key, cells in rows.items()]),
        "Checkpoints": table(
            ("checkpoint", "tags"), [(name, " ".join(tags)) for name, tags in run.checkpoints.items()]
        ),
        "Pictures": "".join(_pictures(run)),
        "Config": table(("differs from the default config", "default", "this run"), changes_of_defaults(run))
        + folded("all of it", f"<pre>{text(format_config(mask_config(run.config)))}</pre>"),
        "Environment": folded(
            "code, packages and machine", table((), [(key, str(value)) for key, value in run.environment.items()])
        ),
        "Commands": table((), commands(run).items()),
    }
    return document(run.name, sections)


def _curves(run: StoredRun) -> str:
    points: Mapping[str, Mapping[int, float]] = run.points
    keys = [key for key, values in points.items() if len(set(values.values())) > 1]
    return drawing(curves([run.name], [points], keys), "curves of the metrics")


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
        caption = text(f"{key}, update {_step(path)}")
        yield f"<figure>{image(content, 'png', key)}<figcaption>{caption}</figcaption></figure>"


def _step(path: Path) -> int:
    text = path.name.partition("+step+")[2].partition("+")[0] or path.stem
    return int(text) if text.isdecimal() else 0
