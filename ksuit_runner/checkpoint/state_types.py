"""The types that the state in a checkpoint may contain, and their encoding as values that need no unpickling.

Torch reads plain values, lists, tuples, dicts and tensors safely. Other types that are common in states, such as numpy
numbers and deques, are packed as a dict that names the type, and restored as that type. Anything else is refused, with
the path to it.
"""

import io
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ksuit_runner.errors import CheckpointError

KIND = "__kind__"
"""Key of a packed value's type, in the dict that represents it."""

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device})
_FACTORIES = {"None": None, **{item.__name__: item for item in (list, dict, set, tuple, int, float, str, bool)}}
_NOT_STORED = "cannot be stored in a checkpoint; use plain numbers, strings, containers or tensors"


class _Refused(Exception):
    """A value cannot be stored; every level that the error passes puts itself in front of the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path = ""


def callback_location(name: str) -> str:
    """Return the location of a callback's state, for messages."""
    return f"callbacks.{name}: state_dict()"


def pack(location: str, state: Any) -> Any:
    """Return a state as plain values, lists, tuples, dicts and tensors; no container is shared with the state.

    Args:
        location: Where the state is from, for the message.
        state: Plain values, tensors, and arrays and numbers of numpy, in containers of Python.

    Raises:
        CheckpointError: It contains something else; the message has the path to it.
    """
    try:
        return _pack(state)
    except _Refused as refused:
        raise CheckpointError(f"{location}{refused.path}: {refused}") from None
    except RecursionError:
        raise CheckpointError(f"{location}: it is nested too deep, or contains itself") from None


def unpack(packed: Any) -> Any:
    """Return what was packed.

    Raises:
        ValueError: It was not packed by this version.
    """
    kind = type(packed)
    if kind is dict:
        if KIND in packed:
            return _unpack_kind(packed)
        return {key: unpack(value) for key, value in packed.items()}
    if kind is list or kind is tuple:
        return kind(map(unpack, packed))
    return packed


def copy_state(location: str, state: Any) -> Any:
    """Copy a state, whose tensors and containers are changed in place later.

    Args:
        location: Where the state is from, for the message.
        state: What ``pack`` takes.

    Raises:
        CheckpointError: It contains something else.
    """
    try:
        return _copy(state)
    except (_Refused, RecursionError):
        pack(location, state)  # its error has the path
        raise


def _copy(state: Any) -> Any:
    kind = type(state)
    if kind in PLAIN:
        return state
    if kind is Tensor:
        return state.detach().clone()
    if kind is dict:
        return {key: _copy(value) for key, value in state.items()}
    if kind is list or kind is tuple:
        return kind([_copy(value) for value in state])
    return unpack(_copy(_pack(state)))


def _pack(state: Any) -> Any:
    kind = type(state)
    if kind in PLAIN:
        return state
    if kind is Tensor:
        if state.is_meta:
            raise _Refused(f"a tensor without data (device meta) {_NOT_STORED}")
        return state
    if kind is dict:
        return _pack_dict(state)
    if kind is list or kind is tuple:
        return kind([_pack_item(i, value) for i, value in enumerate(state)])
    packer = np.generic if isinstance(state, np.generic) else kind
    if packer in _PACKERS:
        return {KIND: packer.__name__, **_PACKERS[packer](state)}
    raise _Refused(f"a {kind.__module__}.{kind.__qualname__} {_NOT_STORED}")


def _pack_item(key: Any, value: Any) -> Any:
    try:
        return _pack(value)
    except _Refused as refused:
        refused.path = f"[{key!r}]{refused.path}"
        raise


def _pack_dict(state: Mapping[Any, Any]) -> dict[Any, Any]:
    packed = {key: _pack_item(key, value) for key, value in state.items()}
    if KIND in packed or not all(map(_is_plain_key, packed)):
        return {KIND: "dict", "items": _pack_items(state)}
    return packed


def _pack_items(state: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    return [(_pack(key), _pack_item(key, value)) for key, value in state.items()]


def _is_plain_key(key: Any) -> bool:
    return type(key) in PLAIN or (type(key) is tuple and all(map(_is_plain_key, key)))


def _pack_array(value: Any) -> dict[str, Any]:
    array, file = np.asarray(value), io.BytesIO()
    if array.dtype.hasobject:
        raise _Refused(f"an array of Python objects {_NOT_STORED}")
    np.lib.format.write_array(file, array, allow_pickle=False)
    return {"npy": file.getvalue()}


def _unpack_array(packed: Mapping[str, Any]) -> Any:
    return np.lib.format.read_array(io.BytesIO(packed["npy"]), allow_pickle=False)


def _pack_default_dict(value: defaultdict[Any, Any]) -> dict[str, Any]:
    name = getattr(value.default_factory, "__name__", "None")
    if _FACTORIES.get(name, _pack) is not value.default_factory:
        raise _Refused(f"a defaultdict of {name} {_NOT_STORED}")
    return {"factory": name, "items": _pack_items(value)}


def _pack_sequence(value: Any) -> dict[str, Any]:
    return {"items": [_pack_item(i, item) for i, item in enumerate(value)]}


def _unpack_items(packed: Mapping[str, Any]) -> list[Any]:
    return [unpack(item) for item in packed["items"]]


def _pack_parameter(value: nn.Parameter) -> dict[str, Any]:
    return {"data": _pack(value.detach()), "requires_grad": value.requires_grad}


_PACKERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    set: _pack_sequence,
    frozenset: _pack_sequence,
    deque: lambda value: {**_pack_sequence(value), "maxlen": value.maxlen},
    OrderedDict: lambda value: {"items": _pack_items(value)},
    Counter: lambda value: {"items": _pack_items(value)},
    defaultdict: _pack_default_dict,
    bytearray: lambda value: {"bytes": bytes(value)},
    type(Path()): lambda value: {"path": str(value)},
    nn.Parameter: _pack_parameter,
    np.ndarray: _pack_array,
    np.generic: _pack_array,
}
_UNPACKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "dict": lambda packed: dict(_unpack_items(packed)),
    "set": lambda packed: set(_unpack_items(packed)),
    "frozenset": lambda packed: frozenset(_unpack_items(packed)),
    "deque": lambda packed: deque(_unpack_items(packed), packed["maxlen"]),
    "OrderedDict": lambda packed: OrderedDict(_unpack_items(packed)),
    "Counter": lambda packed: Counter(dict(_unpack_items(packed))),
    "defaultdict": lambda packed: defaultdict(_FACTORIES[packed["factory"]], _unpack_items(packed)),
    "bytearray": lambda packed: bytearray(packed["bytes"]),
    "PosixPath": lambda packed: Path(packed["path"]),
    "WindowsPath": lambda packed: Path(packed["path"]),
    "Parameter": lambda packed: nn.Parameter(unpack(packed["data"]), packed["requires_grad"]),
    "ndarray": _unpack_array,
    "generic": lambda packed: _unpack_array(packed)[()],
}


def _unpack_kind(packed: Mapping[str, Any]) -> Any:
    try:
        return _UNPACKERS[packed[KIND]](packed)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it has a value of an unknown type, {str(packed[KIND])[:50]!r}") from error
