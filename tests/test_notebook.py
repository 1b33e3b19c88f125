"""Runs in an executed notebook: several of them, a mistake, and the interrupt of the kernel."""

import subprocess
import sys

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
    try:
        run([*few, "trainer.max_epochs=100000"])
    except KeyboardInterrupt:
        resumed = run([few[0], "resume=last", "trainer.max_epochs=1"])
    assert resumed.status == "FINISHED" and {{resumed.folder}} == set(folder.iterdir()) - before
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
    """,
)
EXECUTE = """
import sys
from textwrap import dedent
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
notebook = new_notebook(cells=[new_code_cell(dedent(text)) for text in sys.argv[1:]])
NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
print("executed", sum(cell.execution_count is not None for cell in notebook.cells))
"""


def test_runs_in_an_executed_notebook(tmp_path):
    cells = [text.format(folder=tmp_path / "outputs") for text in CELLS]
    command = [sys.executable, "-c", EXECUTE, *cells]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1:] == [f"executed {len(CELLS)}"], done.stderr
