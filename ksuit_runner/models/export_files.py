"""Files of a trained model that need no code of its project: programs of torch.export, and ONNX."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.nested import tensors_in

_TOLERANCE = 1e-3
_ONNX_LIMIT = 2_000_000_000  # bytes that a file of ONNX can have; the weights of a larger one lie beside it

Computes = Callable[[Any], Sequence[Tensor]]
"""Returns the tensors that what is in a file computes of inputs."""


def write_program(file: Path, program: torch.export.ExportedProgram) -> None:
    """Write a program to a file, which ``torch.export.load`` loads."""
    torch.export.save(program, file)


def read_program(file: Path) -> Computes:
    """Read what ``write_program`` has written."""
    module = torch.export.load(file).module()
    return lambda inputs: tree_leaves(module(inputs))


def write_onnx(file: Path, program: torch.export.ExportedProgram, example: Any) -> None:
    """Write a program to a file of ONNX; weights of more than 2 GB go into ``FILE.data`` beside it.

    Args:
        file: The file.
        program: The program.
        example: Inputs for it.

    Raises:
        ConfigError: ONNX has no operator for something in it.
    """
    size = sum(item.numel() * item.element_size() for item in program.state_dict.values())
    options = {"dynamo": True, "verbose": False, "external_data": size > _ONNX_LIMIT}
    try:
        with _quiet():
            torch.onnx.export(program, (example,), str(file), **options)
    except Exception as error:  # of a dozen modules of two packages
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"torch.onnx cannot export the model: {lines[0][:300]}") from error


def read_onnx(file: Path) -> Computes:
    """Read a file of ONNX, which is run on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        given = dict(zip(names, tree_leaves(inputs), strict=True))
        return [torch.as_tensor(item) for item in session.run(None, {key: item.numpy() for key, item in given.items()})]

    return run


def check_outputs(computes: Computes, module: nn.Module, example: Any, others: Sequence[Any]) -> None:
    """Check that a file computes what a module does, also of other sizes than it was made with.

    Args:
        computes: Computes what the file does.
        module: The module, in evaluation mode.
        example: The inputs that the file was made with.
        others: Further inputs.

    Raises:
        ConfigError: It does not.
    """
    for inputs in (tree_map(lambda item: torch.cat([item, item[:1]]), example), *others):
        with torch.no_grad():
            expected = list(tensors_in(module(inputs)))
            found = computes(inputs)
        if len(found) != len(expected) or not all(map(_alike, found, expected)):
            raise ConfigError("what was written computes something else than the model")


def _alike(found: Tensor, expected: Tensor) -> bool:
    is_same_shape = found.shape == expected.shape
    return is_same_shape and torch.allclose(found.to(expected), expected, _TOLERANCE, _TOLERANCE, equal_nan=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from warning about itself, and about operators of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
