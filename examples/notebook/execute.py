"""Executes a notebook in an empty folder, and writes it with its outputs.

python examples/notebook/execute.py examples/notebook/digits.ipynb examples/notebook/digits.ipynb
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

SHOWN = "/project"
"""What stands for the folder in the outputs."""


def execute(source: Path, target: Path, more: list[str]) -> None:
    """Execute a notebook, and after it more cells, which are written as well."""
    notebook = nbformat.read(source, 4)
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in more]
    with TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=120, kernel_name="python3", coalesce_streams=True)
        client.execute(cwd=folder)
        for number, cell in enumerate(notebook.cells):
            cell.id, cell.metadata = f"cell-{number}", {}
        target.write_text(nbformat.writes(notebook).replace(folder, SHOWN) + "\n", encoding="utf-8")


if __name__ == "__main__":
    execute(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
