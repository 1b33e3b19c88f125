"""Says of an error in a step what tensors it was computed with: most errors of torch do not say which does not fit."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.nested import entries, tensors_in

_STEPS = ("training_step", "_process_batch")
_RAISED = (RuntimeError, ValueError, TypeError, IndexError)  # for a shape or type that does not fit
_OURS = ("torch", "ksuit_runner")  # packages whose part of a traceback says nothing about code of the user's
_OF_THE_MACHINE = re.compile("memory|CUDA|cuDNN|cublas", re.IGNORECASE)
_TORCH = Path(torch.__file__).parent
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


@contextmanager
def misfits_explained(loss: nn.Module) -> Iterator[None]:
    """Explain an error of the trainer's own step in which no code of the user's took part, only torch and what ships.

    Args:
        loss: The loss of the trainer.

    Raises:
        ConfigError: The loss, or the model, does not fit. What torch has warned of before is left out: it is about the
            same, in other words.
    """
    with _held_warnings() as held:
        try:
            yield
        except Exception as error:
            if (explained := _misfit(error, loss)) is None:
                raise
            held[:] = [shown for shown in held if not Path(shown[2]).is_relative_to(_TORCH)]
            raise explained from error


@contextmanager
def _held_warnings() -> Iterator[list[tuple[Any, ...]]]:
    """Hold warnings back until the end of the block; those are shown then that are still in the list.

    Filters stay as they are: ``catch_warnings`` would have forgotten which warnings were shown once.
    """
    show, held, is_over = warnings.showwarning, list[tuple[Any, ...]](), False

    def hold(*warning: Any) -> None:
        if is_over:  # somebody in the block has kept this function
            show(*warning)
        else:
            held.append(warning)

    warnings.showwarning = hold  # type: ignore[assignment]
    try:
        yield held
    finally:
        is_over = True
        if warnings.showwarning is hold:
            warnings.showwarning = show
        for warning in held:
            show(*warning)


def _misfit(error: BaseException, loss: nn.Module) -> ConfigError | None:
    """Return that the loss, or the model, does not fit; None if only a traceback can explain the error."""
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
