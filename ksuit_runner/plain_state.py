"""What the state of a callback may hold: values that are read back without unpickling objects."""

from typing import Any

import torch
from torch import Tensor, nn

from ksuit_runner.errors import CheckpointError

PLAIN = (bool, int, float, complex, str, bytes, Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device)


def check_state(place: str, state: Any) -> None:
    """Check that a state can be read back without unpickling objects.

    Args:
        place: Where the state is from, for the message.
        state: Plain values and tensors in dicts, lists, tuples and sets.

    Raises:
        CheckpointError: It holds something else, such as a number of numpy.
    """
    if isinstance(state, dict):
        for key, value in state.items():
            check_state(place, key)
            check_state(f"{place}['{key}']", value)
    elif type(state) in (list, tuple, set):
        for value in state:
            check_state(place, value)
    elif state is not None and type(state) not in PLAIN:
        name = f"{type(state).__module__}.{type(state).__qualname__}"
        raise CheckpointError(f"{place}: a {name} cannot be kept in a checkpoint; use plain numbers, text or tensors")


def copy_state(place: str, state: Any) -> Any:
    """Copy a state, whose tensors go on being changed in place.

    Args:
        place: Where the state is from, for the message.
        state: Plain values and tensors in dicts, lists, tuples and sets.

    Raises:
        CheckpointError: It holds something else.
    """
    try:
        return _copy(state)
    except TypeError:
        check_state(place, state)
        raise


def _copy(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if type(state) in (list, tuple, set):
        return type(state)(_copy(value) for value in state)
    if state is None or type(state) in PLAIN:
        return state
    raise TypeError
