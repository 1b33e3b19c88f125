"""Draws what each callback that ships logs, from one run with all of them, and writes docs/gallery.md around it."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, HTTPServer
from inspect import signature
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from ksuit_runner.config.check.references import expand
from ksuit_runner.config.groups import choices, shipped_conf
from ksuit_runner.record.journal import JournalReader

DOCS = Path(__file__).parents[1]
FOLDER = DOCS / "pictures" / "callbacks"
MOST_CURVES, MOST_ROWS, MOST_COLUMNS = 6, 8, 7

# What a callback does is seen in the metrics of others.
SEEN_IN = {
    "ema": ["accuracy/validation", "accuracy/validation/ema"],
    "swa": ["accuracy/validation", "accuracy/validation/swa"],
    "batchnorm_statistics": ["accuracy/validation", "accuracy/validation/ema"],
    "best_metric": ["best_metric/*"],
    "robustness": ["accuracy/robustness", "accuracy/robustness/*"],
    "test_accuracy": ["accuracy/test/best*"],
}
# What is written beside metrics, pictures and tables: patterns of paths in the folder of the run.
WRITTEN_TO = {
    "features": "artifacts/files/features/**/*.safetensors",
    "weights_checkpoint": "artifacts/weights/weights_checkpoint/**/*.safetensors",
    "export_model": "artifacts/models/**/*",
    "profiler": "artifacts/files/time/**/*",
    "best_loss": "artifacts/checkpoints/*/model.safetensors",
}
SHORT = ("model=mlp", "tracker=noop", "default_callbacks=none")
# Callbacks that say something, or that need other data: a run in which they do.
SAID_IN = {
    "early_stop": [*SHORT, "callbacks=[accuracy,early_stop]", "callbacks.early_stop.patience=2", "optimizer.lr=0"],
    "stop_at": [*SHORT, "callbacks=[accuracy,stop_at]", "callbacks.stop_at.update=30"],
    "nan_watch": [*SHORT, "callbacks=[nan_watch]", "optimizer.lr=1e18", "trainer.max_epochs=1"],
    "best_checkpoint": ["model=mlp", "tracker=noop", "callbacks=[accuracy,best_checkpoint]", "trainer.max_epochs=4"],
    "prune": [
        "sweep=optuna",
        "tracker=noop",
        "sweep.samples=13",
        "trainer.max_epochs=4",
        "callbacks.prune.min_trials=3",
    ],
}
DRAWN_FROM = {
    "learning_rate_finder": ["debug=learning_rate_finder", "model=mlp", "tracker=noop"],
    "regression_errors": ["data=diabetes", "tracker=noop", "callbacks=[regression_errors]"],
    "batchnorm_statistics": ["model=cnn", "tracker=noop", "callbacks=[ema,batchnorm_statistics,accuracy]"],
}


class Run:
    """What a run has left: its config, the points of each metric, and the files that were logged."""

    def __init__(self, folder: Path) -> None:
        self.config: Any = OmegaConf.load(folder / "artifacts" / "config.yaml")
        self.points: dict[str, list[tuple[int, float]]] = {}
        self.files: dict[str, Path] = {}  # the newest ones
        self.folder = folder
        for line, _ in JournalReader(folder / "metrics.jsonl").lines():
            for point in line.points:
                self.points.setdefault(point.key, []).append((point.step, point.value))
            for file in line.files:
                self.files[file.key] = folder / "artifacts" / file.path


def main() -> None:
    """Make all pictures and the page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        run = trained(Path(place), "debug=all_callbacks", "trainer.max_epochs=12")
        drawn = {name: draw(name, config, run) for name, config in run.config.callbacks.items()}
    for name, overrides in DRAWN_FROM.items():
        with tempfile.TemporaryDirectory() as place:
            run = trained(Path(place), *overrides)
            drawn[name] = draw(name, run.config.callbacks[name], run)
    for name, overrides in SAID_IN.items():
        with tempfile.TemporaryDirectory() as place:
            drawn[name] = write_terminal(name, train(Path(place), *overrides))
    drawn["notify"] = write_terminal("notify", message())
    write_page({name: path for name, path in drawn.items() if path is not None})


def trained(folder: Path, *overrides: str) -> Run:
    """Run the command line, and return what the run has left."""
    train(folder, *overrides)
    [run] = (folder / "runs").iterdir()
    return Run(run)


def train(folder: Path, *overrides: str) -> str:
    """Run the command line, and return what it prints."""
    command = [sys.executable, "-m", "ksuit_runner", *overrides, f"output_dir={folder}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.replace(str(folder), "outputs")


def message() -> str:
    """Return the message that a run sends at its end, to an address of this machine."""
    received: list[dict[str, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Receiver) as server, tempfile.TemporaryDirectory() as place:
        Thread(target=server.serve_forever, daemon=True).start()
        os.environ["KSUIT_NOTIFY_URLS"] = f"json://127.0.0.1:{server.server_port}"
        train(Path(place), "model=mlp", "tracker=noop", "callbacks=[accuracy,notify]")
        server.shutdown()
    [sent] = received
    return f"{sent['title']}\n\n{sent['message']}"


def draw(name: str, config: Mapping[str, Any], run: Run) -> Path | None:
    """Draw the metrics and the newest picture or table of a callback; None if it logs nothing."""
    patterns = SEEN_IN.get(name) or patterns_of(config)
    keys = [key for key in run.points if any(fnmatchcase(key, pattern) for pattern in patterns)]
    curves = [key for key in keys if len(run.points[key]) > 1][:MOST_CURVES]
    files = [key for key in run.files if key.partition("/")[2].partition("/")[0] == name]
    pictures = [key for key in files if run.files[key].suffix == ".png"][:1]
    tables = [key for key in files if run.files[key].suffix == ".json"][:1]
    values = [] if curves or pictures or tables else [[key, f"{run.points[key][-1][1]:.4g}"] for key in keys]
    found = [] if values or name not in WRITTEN_TO else sorted(run.folder.glob(WRITTEN_TO[name]))
    written = [[str(path.relative_to(run.folder)), size(path)] for path in found if path.is_file()]
    values += written
    panels = [*pictures, *tables[: not pictures], *curves[:1], *["values"] * bool(values)]
    if not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 if written else 4.4 * len(panels), 2.6), squeeze=False, layout="constrained"
    )
    for panel, axis in zip(panels, axes[0], strict=True):
        if panel in pictures:
            axis.imshow(Image.open(run.files[panel]), cmap="gray")
            axis.axis("off")
        elif panel in tables:
            show_table(axis, run.files[panel])
        elif panel in curves:
            for key in curves:
                axis.plot(*zip(*run.points[key], strict=True), label=key, linewidth=1.2)
            values = [value for key in curves for _, value in run.points[key]]
            if min(values) > 0 and max(values) > 50 * min(values):
                axis.set_yscale("log")
            axis.legend(fontsize=6.5, frameon=False)
            axis.set_xlabel("update", fontsize=7)
            axis.tick_params(labelsize=7)
        else:
            show_cells(axis, ["file", "size"] if written else ["metric", "value"], values)
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
    return path


def patterns_of(config: Mapping[str, Any]) -> list[str]:
    """Return the patterns of the keys that a callback logs, with its arguments in them."""
    module, _, name = config["_target_"].rpartition(".")
    callback = getattr(importlib.import_module(module), name)
    defaults = {
        key: item.default for base in callback.__mro__[::-1] for key, item in signature(base).parameters.items()
    }
    arguments = {**defaults, **config, "weights": ["", "*"]}
    return [key for pattern in callback.logs or () for key in expand(pattern, arguments)]


def size(path: Path) -> str:
    """Return the size of a file."""
    return f"{path.stat().st_size / 1024:.1f} KB"


def show_table(axis: Axes, path: Path) -> None:
    """Draw the first rows of a logged table."""
    table = json.loads(path.read_text())
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in table["data"]]
    show_cells(axis, table["columns"], cells)


def show_cells(axis: Axes, columns: list[str], rows: list[list[str]]) -> None:
    """Draw cells, without those that there is no room for."""
    axis.axis("off")
    cut = [[cell if len(cell) < 70 else f"...{cell[-66:]}" for cell in row[:MOST_COLUMNS]] for row in rows[:MOST_ROWS]]
    drawn = axis.table(cut, colLabels=columns[:MOST_COLUMNS], loc="center", edges="horizontal", cellLoc="left")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(7)
    drawn.auto_set_column_width(range(len(columns[:MOST_COLUMNS])))


def write_terminal(name: str, output: str) -> Path:
    """Draw the last lines of what a command has printed."""
    lines = [line for line in output.splitlines() if not line.startswith(("folder", "resume"))][-14:]
    console = Console(record=True, width=max(100, min(max(map(len, lines)), 130)), file=StringIO())
    console.print("\n".join(lines), highlight=False, markup=False)
    path = FOLDER / f"{name}.svg"
    path.write_text(console.export_svg(title=f"callbacks: {name}"))
    return path


def write_page(drawn: Mapping[str, Path]) -> None:
    """Write the page: a section for each callback, with the first comment of its file in conf/."""
    lines = [
        "# Gallery",
        "",
        "What the callbacks log and say in twelve epochs on the digits, with `debug=all_callbacks`, or in a run that",
        "shows it. `make pictures` draws it anew. [Callbacks](callbacks.md) has them in a table, also the one that",
        "needs what is not everywhere: `memory_snapshot` (a GPU), whose file https://pytorch.org/memory_viz shows.",
    ]
    for name, comment in comments().items():
        if name in drawn:
            lines += [
                "",
                f"## {name}",
                "",
                f"{comment[0].upper()}{comment[1:]}.",
                "",
                f"![{name}](pictures/callbacks/{drawn[name].name})",
            ]
    (DOCS / "gallery.md").write_text("\n".join(lines) + "\n")


def comments() -> dict[str, str]:
    """Return what each callback is, as its file in conf/ says."""
    files = [shipped_conf() / "callbacks" / f"{choice}.yaml" for choice in choices("callbacks")]
    return {path.stem: path.read_text().splitlines()[0].removeprefix("# ").rstrip(" .;,") for path in files}


if __name__ == "__main__":
    main()
