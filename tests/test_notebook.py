"""The example notebook and more cells, executed by one kernel: bar and pictures, a mistake, and the interrupt."""

import re
import subprocess
import sys
from ast import literal_eval
from textwrap import dedent

import nbformat
import pytest
from command import REPOSITORY

CELLS = (
    """
    import os, signal, threading
    from ksuit_runner import ConfigError, compose, run
    from ksuit_runner.reports import live_curves

    others = signal.valid_signals() - {{signal.SIGCHLD}}  # which torch sets for workers, once and for good
    handlers = [signal.getsignal(number) for number in others]
    few = ["output_dir={folder}", "model=linear", "callbacks=[accuracy]", "tracker=noop", "trainer.max_epochs=1"]
    first = run(few)
    """,
    """
    config = compose(few)
    config.seed = 1
    second = run(config)
    assert first.status == second.status == "FINISHED" and first.run_id != second.run_id
    try:
        run(["model=ccn"])
    except ConfigError as error:
        assert "'cnn'" in str(error)
    """,
    """
    live_curves._FIRST_S = 0.0
    folder = first.folder.parent
    before = set(folder.iterdir())

    def interrupt():
        while not any((path / "metrics.jsonl").is_file() for path in set(folder.iterdir()) - before):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    interrupted = run([*few, "trainer.max_epochs=100000", "data.num_workers=2"])
    assert interrupted.status == "KILLED" and "killed" in interrupted._repr_html_()
    resumed = run([few[0], "resume=last", "trainer.max_epochs=1"])
    assert resumed.status == "FINISHED" and {{resumed.folder}} == set(folder.iterdir()) - before
    assert handlers == [signal.getsignal(number) for number in others]
    interrupted
    """,
)


def outputs_of(path):
    """Return the outputs of the code cells, without what was printed."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return [[item.data for item in cell.outputs if item.output_type != "stream"] for cell in cells]


def cells_of(table):
    """Return the cells of a table of HTML, values as numbers."""
    texts = re.findall("<t[dh][^>]*>([^<]*)<", table["text/html"])
    return [float(text) if "." in text else text for text in texts]


def test_runs_in_an_executed_notebook(tmp_path):
    example, executed = REPOSITORY / "examples" / "notebook" / "digits.ipynb", tmp_path / "executed.ipynb"
    cells = [dedent(text.format(folder=tmp_path / "more")) for text in CELLS]
    command = [sys.executable, str(example.with_name("execute.py")), str(example), str(executed), *cells]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    stored, (*found, _, _, live) = outputs_of(example), outputs_of(executed)
    assert [[set(data) for data in cell] for cell in stored] == [[set(data) for data in cell] for cell in found]
    (bar,), (result,), (table,), (*_, longer), (predictions,) = found
    assert "accuracy/validation" in bar["text/plain"] and "<span" in bar["text/html"]
    shown = result["text/html"]
    assert "accuracy/test/best" in shown and '<img src="data:image/png;base64,iVBOR' in shown
    assert cells_of(table) == [
        pytest.approx(cell, abs=0.02) if isinstance(cell, float) else cell for cell in cells_of(stored[2][0])
    ], "another machine may round differently"
    assert "accuracy/validation/ema" in cells_of(table)
    assert float(longer["text/plain"]) == pytest.approx(float(stored[3][-1]["text/plain"]), abs=0.02)
    assert literal_eval(predictions["text/plain"])[1] == literal_eval(stored[4][0]["text/plain"])[1]
    assert "image/png" in {kind for data in live for kind in data}, "curves are drawn while a run trains"
    assert "killed" in live[-1]["text/html"] and "<img" not in live[-1]["text/html"], "and not once more as its value"
    text = example.read_text()
    assert "/project/outputs" in text and "Warning" not in text and len(text) < 200_000
