"""Writes a module in MLflow's format for models, without MLflow: as a program of torch, for which no code is needed."""

import json
import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ksuit_runner.errors import ConfigError

_DATA, _PROGRAM = "data", "model.pt2"
_EXAMPLE, _REQUEST = "input_example.json", "serving_input_example.json"
_PACKAGES = ("mlflow", "torch", "numpy")
_TOLERANCE = 1e-3


def export_program(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Return a module in evaluation mode as a program that computes batches of any size.

    Args:
        module: The module, on the CPU; one tensor in, one tensor out, of shapes (batch, ...).
        example: Inputs for it, of shape (batch, ...), with at least two samples.

    Raises:
        ConfigError: torch cannot export it, or it computes something else than the program.
    """
    more = torch.cat([example, example[:1]])
    with torch.no_grad():
        expected = module(more)
    if not isinstance(expected, Tensor):
        raise ConfigError(f"the model returns {type(expected).__name__}, and MLflow serves a single tensor only")
    try:
        program = _export(module, example)
        found = program.module()(more)
    except Exception as error:  # of the model, and of a dozen modules of torch
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"torch.export cannot export the model for batches of any size: {lines[0][:300]}") from error
    if not torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
        raise ConfigError("what torch.export makes of the model computes something else")
    return program


def _export(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Trace a module; what takes the number of samples as a Python number, such as ``len(x)``, by its bytecode."""
    given: dict[str, Any] = {"args": (example,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own recurrent layers
        try:
            return torch.export.export(module, **given, strict=False)
        except Exception:
            return torch.export.export(module, **given, strict=True)


def write_mlflow_model(folder: Path, program: torch.export.ExportedProgram, example: Tensor, run_id: str) -> None:
    """Write a program into an empty folder, so that MLflow and plain torch load it.

    ``mlflow.pytorch.load_model``, ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` take the folder,
    ``torch.export.load`` takes ``data/model.pt2`` in it. The signature has any number of samples.

    Args:
        folder: The folder.
        program: The program.
        example: Inputs for it, of shape (batch, ...), which become the example of the model.
        run_id: Id of the run that the model is of.
    """
    (folder / _DATA).mkdir()
    torch.export.save(program, folder / _DATA / _PROGRAM)
    python = platform.python_version()
    packages = [f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES]
    conda = {"name": "mlflow-env", "channels": ["conda-forge"]}
    conda["dependencies"] = [f"python={python}", "pip", {"pip": packages}]  # type: ignore[list-item]
    build = {"python": python, "build_dependencies": ["pip", "setuptools", "wheel"]}
    inputs = example.tolist()
    with torch.no_grad():
        outputs = program.module()(example)
    texts = {
        "MLmodel": _yaml(_description(example, outputs, python, run_id)),
        "requirements.txt": "\n".join(packages) + "\n",
        "conda.yaml": _yaml(conda),
        "python_env.yaml": _yaml({**build, "dependencies": ["-r requirements.txt"]}),
        _EXAMPLE: json.dumps(inputs),
        _REQUEST: json.dumps({"inputs": inputs}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


def _description(example: Tensor, outputs: Tensor, python: str, run_id: str) -> dict[str, Any]:
    return {
        "flavors": {
            "python_function": {
                "config": {"device": None},
                "data": _DATA,
                "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
                "loader_module": "mlflow.pytorch",
                "python_version": python,
            },
            "pytorch": {"code": None, "model_data": _DATA, "pytorch_version": str(torch.__version__)},
        },
        "mlflow_version": version("mlflow"),
        "run_id": run_id,
        "saved_input_example_info": {"artifact_path": _EXAMPLE, "serving_input_path": _REQUEST, "type": "ndarray"},
        "signature": {"inputs": _schema(example), "outputs": _schema(outputs), "params": None},
    }


def _schema(tensor: Tensor) -> str:
    spec = {"dtype": str(tensor.numpy().dtype), "shape": [-1, *tensor.shape[1:]]}
    return json.dumps([{"type": "tensor", "tensor-spec": spec}])


def _yaml(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=True)
    return text
