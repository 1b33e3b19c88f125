"""Says of an error in a step what tensors it was computed with: most errors of torch do not say which does not fit."""

import re
from collections.abc import Mapping
from traceback import walk_tb
from typing import Any

from torch import Tensor, nn

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.nested import entries, tensors_in

_STEPS = ("training_step", "_process_batch")
_RAISED = (RuntimeError, ValueError, TypeError, IndexError)  # for a shape or type that does not fit
_OURS = ("torch", "ksuit_runner")  # packages whose part of a traceback says nothing about code of the user's
_OF_THE_MACHINE = re.compile("memory|CUDA|cuDNN|cublas", re.IGNORECASE)
_MOST_ENTRIES = 8
_LONGEST = 600


def note_tensors(error: BaseException) -> None:
    """Add a line to an error that was raised in a step: names, types and shapes of the step's batch and other tensors.

    Args:
        error: What ``training_step``, or a callback's ``_process_batch``, has raised.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name in _STEPS]
    if not frames or not isinstance(error, _RAISED) or any(_is_ours(note) for note in getattr(error, "__notes__", ())):
        return
    found = dict(frames[-1].f_locals)
    batch = found.pop("batch", None)
    named = {
        name: value for name, value in found.items() if name != "self" and next(tensors_in(value), None) is not None
    }
    seen = {id(tensor) for value in named.values() for tensor in tensors_in(value)}
    if any(id(tensor) not in seen for tensor in tensors_in(batch)):
        named = {"batch": batch, **named}
    if named:
        text = ", ".join(f"{name}: {as_text(value)}" for name, value in named.items())
        error.add_note(f"{_begin(frames[-1].f_code.co_name)}{text[:_LONGEST]}")


def misfit(error: BaseException, loss: nn.Module) -> ConfigError | None:
    """Explain an error of the trainer's own step in which no code of the user's took part, only torch and what ships.

    Args:
        error: What ``training_step`` has raised, with its note.
        loss: The loss of the trainer.

    Returns:
        That the loss, or the model, does not fit; None if only a traceback can explain the error.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    steps = [index for index, frame in enumerate(frames) if frame.f_code.co_name == "training_step"]
    inside = frames[steps[-1] :] if steps else []
    packages = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame in inside}
    if not inside or not packages <= {*_OURS} or type(error) not in _RAISED or _OF_THE_MACHINE.search(str(error)):
        return None
    is_loss = any(frame.f_locals.get("self") is loss for frame in inside)
    outputs = f"{type(loss).__name__} does not fit the model's outputs and the targets"
    what = outputs if is_loss else "its layers do not fit each other, or the data"
    notes = filter(_is_ours, getattr(error, "__notes__", ()))
    return ConfigError("\n".join([f"{what}: {error}", *notes]), path="loss" if is_loss else "model")


def _begin(step: str) -> str:
    return f"tensors in {step}: "


def _is_ours(note: str) -> bool:
    return note.startswith(tuple(map(_begin, _STEPS)))


def as_text(tree: Any) -> str:
    """Write a tree of tensors as types and shapes, such as ``(float32 (64, 1, 8, 8), int64 (64,))``."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    items = list(entries(tree))
    if not items:
        return type(tree).__name__
    is_named = isinstance(tree, Mapping)
    texts = [f"{key}: {as_text(item)}" if is_named else as_text(item) for key, item in items[:_MOST_ENTRIES]]
    return f"({', '.join([*texts, '...'] if len(items) > _MOST_ENTRIES else texts)})"
