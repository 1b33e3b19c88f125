"""Writes a module in MLflow's format for models, without MLflow: as a program of torch, for which no code is needed."""

import json
import platform
import shutil
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ksuit_runner.errors import ConfigError
from ksuit_runner.models import served_program
from ksuit_runner.tensors.nested import entries, named_tensors

_DATA, _PROGRAM, _CODE, _LOADER = "data", "model.pt2", "code", "ksuit_served_program"
PROGRAM = f"{_DATA}/{_PROGRAM}"
"""File with the program in the folder of a model."""
_EXAMPLE, _REQUEST = "input_example.json", "serving_input_example.json"
_PACKAGES = ("mlflow", "torch", "numpy")
_TOLERANCE = 1e-3


def export_program(module: nn.Module, example: Any, others: Sequence[Any] = ()) -> torch.export.ExportedProgram:
    """Return a module in evaluation mode as a program that computes batches of any size.

    Args:
        module: The module, on the CPU. Its only argument and what it returns are tensors of shape (batch, ...), or such
            tensors in dicts, lists and tuples.
        example: Inputs for it, with at least two samples; plain containers, see ``plain_inputs``.
        others: Further inputs. The program takes any size of those dimensions in which they differ from the example,
            such as the length of texts.

    Raises:
        ConfigError: torch cannot export it, or it computes something else than the program.
    """
    samples: list[Any] = [tree_map(lambda item: torch.cat([item, item[:1]]), example), *others]
    with torch.no_grad():
        expected = [module(inputs) for inputs in samples]
    if not _is_plain(expected[0]):
        _plain(expected[0], "the model returns")
        module = _WithPlainOutputs(module)
    try:
        program = _export(module, example, others)
        found = [program.module()(inputs) for inputs in samples]
    except Exception as error:  # of the model, and of a dozen modules of torch
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"torch.export cannot export the model for batches of any size: {lines[0][:300]}") from error
    for own, other in zip(tree_leaves(list(map(_plain, expected))), tree_leaves(found), strict=True):
        if not torch.allclose(other, own, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            raise ConfigError("what torch.export makes of the model computes something else")
    return program


def plain_inputs(inputs: Any) -> Any:
    """Return inputs of a model, or what is like a dict in them, such as a ``BatchEncoding``, as dicts.

    Raises:
        ConfigError: There is something else in them than tensors, dicts, lists and tuples.
    """
    return _plain(inputs, "the inputs are")


def _plain(tree: Any, what: str = "", way: str = "") -> Any:
    if isinstance(tree, Tensor):
        return tree
    if isinstance(tree, Mapping):
        return {str(key): _plain(value, what, f"{way}/{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_plain(value, what, f"{way}/{index}") for index, value in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    at = f" at '{way[1:]}'" if way else ""
    raise ConfigError(
        f"{what} {type(tree).__name__}{at}: only tensors, or dicts, lists and tuples of them, are exported"
    )


def _is_plain(tree: Any) -> bool:
    """Whether a tree needs no class but Python's own, which a program could not be loaded without."""
    if isinstance(tree, Tensor):
        return True
    return type(tree) in (dict, list, tuple) and all(_is_plain(value) for _, value in entries(tree))


class _WithPlainOutputs(nn.Module):
    """Returns what a model returns in dicts, and not in a class of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Any) -> Any:
        """Compute the outputs."""
        return _plain(self.module(inputs))


def _export(module: nn.Module, example: Any, others: Sequence[Any]) -> torch.export.ExportedProgram:
    """Trace a module; what takes the number of samples as a Python number, such as ``len(x)``, by its bytecode."""
    batch = torch.export.Dim("batch")

    def sizes(item: Tensor, *more: Tensor) -> dict[int, Any]:
        differ = [at for at in range(1, item.ndim) if any(other.shape[at] != item.shape[at] for other in more)]
        return {0: batch, **dict.fromkeys(differ, torch.export.Dim.DYNAMIC)}

    shapes: tuple[Any, ...] = (tree_map(sizes, example, *others),)
    first = next(iter(signature(module.forward).parameters.values()))
    if first.kind is first.VAR_POSITIONAL:  # as in what wraps another model: forward(*args, **kwargs)
        shapes = (shapes,)
    given: dict[str, Any] = {"args": (example,), "dynamic_shapes": shapes}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own recurrent layers
        try:
            return torch.export.export(module, **given, strict=False)
        except Exception:
            return torch.export.export(module, **given, strict=True)


def write_mlflow_model(folder: Path, program: torch.export.ExportedProgram, example: Any, run_id: str) -> None:
    """Write a program into an empty folder, so that MLflow and plain torch load it.

    ``mlflow.pytorch.load_model``, ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` take the folder,
    ``torch.export.load`` takes ``data/model.pt2`` in it. The signature has any number of samples. Several inputs and
    outputs are named in it by the way to them, such as ``latent/mean``; MLflow then takes and returns them by name.

    Args:
        folder: The folder.
        program: The program.
        example: Inputs for it, as ``export_program`` takes them, which become the example of the model.
        run_id: Id of the run that the model is of.
    """
    (folder / _DATA).mkdir()
    torch.export.save(program, folder / _DATA / _PROGRAM)
    python = platform.python_version()
    packages = [f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES]
    conda = {"name": "mlflow-env", "channels": ["conda-forge"]}
    conda["dependencies"] = [f"python={python}", "pip", {"pip": packages}]  # type: ignore[list-item]
    build = {"python": python, "build_dependencies": ["pip", "setuptools", "wheel"]}
    with torch.no_grad():
        outputs = program.module()(example)
    is_named = not (isinstance(example, Tensor) and isinstance(outputs, Tensor))
    if is_named:
        _write_loader(folder, example, outputs)
    inputs = {name: item.tolist() for name, item in _by_name(example).items()}
    values = inputs.get("", inputs)
    texts = {
        "MLmodel": _yaml(_description(program, example, outputs, python, run_id, is_named)),
        "requirements.txt": "\n".join(packages) + "\n",
        "conda.yaml": _yaml(conda),
        "python_env.yaml": _yaml({**build, "dependencies": ["-r requirements.txt"]}),
        _EXAMPLE: json.dumps(values),
        _REQUEST: json.dumps({"inputs": values}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


def _by_name(tree: Any) -> dict[str, Tensor]:
    """Return the tensors in a tree by the way to them, or the only one under an empty name."""
    return {"": tree} if isinstance(tree, Tensor) else dict(named_tensors(tree))


def _write_loader(folder: Path, example: Any, outputs: Any) -> None:
    """Write what MLflow loads a program with that takes or returns several tensors, for which it has nothing itself."""
    (folder / _CODE).mkdir()
    shutil.copyfile(served_program.__file__, folder / _CODE / f"{_LOADER}.py")
    names = {"inputs": list(_by_name(example)), "outputs": list(_by_name(outputs))}
    (folder / _DATA / served_program.NAMES).write_text(json.dumps(names))


def _description(
    program: torch.export.ExportedProgram, example: Any, outputs: Any, python: str, run_id: str, is_named: bool
) -> dict[str, Any]:
    loader = {"code": _CODE, "loader_module": _LOADER} if is_named else {"loader_module": "mlflow.pytorch"}
    signature = program.graph_signature
    return {
        "flavors": {
            "python_function": {
                "config": {} if is_named else {"device": None},
                "data": _DATA,
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
                **loader,
                "python_version": python,
            },
            "pytorch": {"code": None, "model_data": _DATA, "pytorch_version": str(torch.__version__)},
        },
        "mlflow_version": version("mlflow"),
        "run_id": run_id,
        "saved_input_example_info": {"artifact_path": _EXAMPLE, "serving_input_path": _REQUEST, "type": "ndarray"},
        "signature": {
            "inputs": _schema(program, signature.user_inputs, example),
            "outputs": _schema(program, signature.user_outputs, outputs),
            "params": None,
        },
    }


def _schema(program: torch.export.ExportedProgram, nodes: Sequence[Any], tree: Any) -> str:
    """Return what MLflow's signature says of tensors: -1 stands for a size that the program leaves open."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    specs = []
    for node, (name, tensor) in zip(nodes, _by_name(tree).items(), strict=True):
        shape = [size if isinstance(size, int) else -1 for size in values[node].shape]
        spec = {"type": "tensor", "tensor-spec": {"dtype": str(tensor.numpy().dtype), "shape": shape}}
        specs.append({"name": name, **spec} if name else spec)
    return json.dumps(specs)


def _yaml(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=True)
    return text
