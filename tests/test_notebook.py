"""The example notebook and more cells, executed by one kernel: bar and pictures, a mistake, and the interrupt."""

import subprocess
import sys

import nbformat
from command import REPOSITORY

CELLS = (
    """
    import os, signal, threading
    from ksuit_runner import ConfigError, compose, run

    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
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
    folder = first.folder.parent
    before = set(folder.iterdir())

    def interrupt():
        while not any((path / "metrics.jsonl").is_file() for path in set(folder.iterdir()) - before):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    interrupted = run([*few, "trainer.max_epochs=100000"])
    assert interrupted.status == "KILLED" and "killed" in interrupted._repr_html_()
    resumed = run([few[0], "resume=last", "trainer.max_epochs=1"])
    assert resumed.status == "FINISHED" and {{resumed.folder}} == set(folder.iterdir()) - before
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
    """,
)
EXECUTE = """
import sys
from textwrap import dedent
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
notebook.cells += [nbformat.v4.new_code_cell(dedent(text)) for text in sys.argv[3:]]
NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=sys.argv[2])
nbformat.write(notebook, sys.argv[1])
"""


def test_runs_in_an_executed_notebook(tmp_path):
    example, executed = REPOSITORY / "examples" / "notebook" / "digits.ipynb", tmp_path / "executed.ipynb"
    executed.write_text(example.read_text())
    cells = [text.format(folder=tmp_path / "more") for text in CELLS]
    command = [sys.executable, "-c", EXECUTE, str(executed), str(tmp_path), *cells]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, result, table, longer, predictions = [
        cell.outputs for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code"
    ][:5]
    (bar,) = [item.data for item in first if item.output_type == "display_data"]
    assert "accuracy/validation" in bar["text/plain"] and "<span" in bar["text/html"]
    shown = result[0].data["text/html"]
    assert "accuracy/test/best" in shown and '<img src="data:image/png;base64,iVBOR' in shown
    assert "accuracy/validation/ema" in table[0].data["text/html"]
    assert float(longer[-1].data["text/plain"]) > 0.5
    assert predictions[0].data["text/plain"].startswith("([")
