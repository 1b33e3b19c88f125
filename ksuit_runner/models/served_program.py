"""Serves a program of torch with several inputs or outputs: MLflow loads the copy of this file in the model's folder.

It imports nothing of this package, which need not be there.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

NAMES = "names.json"
"""File beside the program: the names of its inputs and outputs, in order; a single one may have an empty name."""


class ServedProgram:
    """Computes arrays of numpy by name.

    Args:
        folder: Folder with the program, and the names.
    """

    def __init__(self, folder: Path) -> None:
        program = torch.export.load(folder / "model.pt2")
        self._module, self._structure = program.module(), program.call_spec.in_spec
        names = json.loads((folder / NAMES).read_text())
        self._inputs, self._outputs = names["inputs"], names["outputs"]

    def predict(self, model_input: Any, params: Any = None) -> Any:
        """Return the outputs by name, or the only one that has no name.

        Args:
            model_input: The inputs by name, or the only one that has no name.
            params: Nothing; MLflow passes it.
        """
        arrays = [model_input[name] if name else model_input for name in self._inputs]
        args, kwargs = tree_unflatten([torch.as_tensor(array) for array in arrays], self._structure)
        with torch.no_grad():
            outputs = self._module(*args, **kwargs)
        found = dict(zip(self._outputs, (leaf.numpy() for leaf in tree_leaves(outputs)), strict=True))
        return found.get("", found)


def _load_pyfunc(path: str) -> ServedProgram:
    return ServedProgram(Path(path))
