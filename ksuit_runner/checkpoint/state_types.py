"""The types that the state in a checkpoint may contain, and their encoding as JSON and tensors.

A state becomes a document of JSON, with its tensors beside it: the document refers to them by key, and the key is the
JSON pointer (RFC 6901) to the reference, so that no two are the same. Plain values, lists, and dicts with texts as keys
are what they are in JSON. Other types that are common in states, such as tuples, non-finite numbers and deques, are an
object that names the type, and are restored as that type. Anything else is refused, with the path to it.
"""

import io
import math
import re
import struct
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ksuit_runner.checkpoint.tensor_file import fits_file, is_dense, is_file_type
from ksuit_runner.distributed.pieces import Piece, is_sharded, piece_of
from ksuit_runner.errors import CheckpointError
from ksuit_runner.tensors.layout import row_major

KIND = "__kind__"
"""Key of a value's type, in the object that represents it."""

MOST_LEVELS = 100
"""How deep a state may be nested: whatever is stored can be read, however deep the reader's stack is already."""

Tensors = dict[str, Tensor]

_IMMUTABLE = frozenset({type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device})
_FACTORIES = {"None": None, **{item.__name__: item for item in (list, dict, set, tuple, int, float, str, bool)}}
_DTYPES = {str(item).removeprefix("torch."): item for item in vars(torch).values() if isinstance(item, torch.dtype)}
_NUMBERS = {
    name: np.dtype(name).type
    for name in ("bool", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)))
    if name != "float8"
}
_COMPRESSED = {
    "sparse_csr": (torch.sparse_csr, Tensor.crow_indices, Tensor.col_indices),
    "sparse_csc": (torch.sparse_csc, Tensor.ccol_indices, Tensor.row_indices),
    "sparse_bsr": (torch.sparse_bsr, Tensor.crow_indices, Tensor.col_indices),
    "sparse_bsc": (torch.sparse_bsc, Tensor.ccol_indices, Tensor.row_indices),
}
_INT64 = 1 << 63
_NAN_BITS = 0x7FF8000000000000
_NAN = re.compile(r"nan\(([0-9a-f]{16})\)")
_NOT_STORED = "cannot be stored in a checkpoint; use plain numbers, strings, containers or tensors"


class _Refused(Exception):
    """A value cannot be stored; every level that the error passes puts itself in front of the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path = ""


def callback_location(name: str) -> str:
    """Return the location of a callback's state, for messages."""
    return f"callbacks.{name}: state_dict()"


def pointer(*keys: str) -> str:
    """Return the JSON pointer to a value below the root of a document."""
    return "".join(f"/{_escaped(key)}" for key in keys)


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1") if "~" in key or "/" in key else key


def copy_state(location: str, state: Any) -> Any:
    """Copy a state, whose tensors and containers are changed in place later.

    Args:
        location: Where the state is from, for the message.
        state: What ``Packer.pack`` takes.

    Raises:
        CheckpointError: It contains something else.
    """
    try:
        return _copy(state)
    except (_Refused, RecursionError):
        Packer().pack(location, state, "")  # its error has the path
        raise


def _copy(state: Any) -> Any:
    kind = type(state)
    if kind in _IMMUTABLE:
        return state
    if kind is Tensor:
        return state.detach().clone()
    if kind is dict:
        return {key: _copy(value) for key, value in state.items()}
    if kind is list or kind is tuple:
        return kind([_copy(value) for value in state])
    packer = Packer()
    return unpack(packer.pack_value(state, ""), packer.tensors)


class Packer:
    """Packs states into one document, and collects their tensors.

    Attributes:
        tensors: The tensors of all documents so far, by key. They share their memory with the states.
        pieces: What this rank holds of the tensors that are spread over the ranks, by key, likewise.
    """

    def __init__(self) -> None:
        self.tensors: Tensors = {}
        self.pieces: dict[str, Piece] = {}
        self._level = 0

    def pack(self, location: str, state: Any, at: str) -> Any:
        """Return a state as values of JSON; no container is shared with the state.

        Args:
            location: Where the state is from, for the message.
            state: Plain values, tensors, and arrays and numbers of numpy, in containers of Python.
            at: JSON pointer to where it will be in the document.

        Raises:
            CheckpointError: It contains something else; the message has the path to it.
        """
        try:
            return self.pack_value(state, at)
        except _Refused as refused:
            raise CheckpointError(f"{location}{refused.path}: {refused}") from None
        except RecursionError:
            raise CheckpointError(f"{location}: it is nested too deep, or contains itself") from None
        finally:
            self._level = 0

    def pack_value(self, value: Any, at: str) -> Any:
        """Return a part of a state as a value of JSON; see ``pack``."""
        if _is_plain(value):
            return value
        kind = type(value)
        if kind is float:
            return {KIND: "float", "value": _non_finite(value)}
        if kind is int:
            return {KIND: "int", "value": hex(value)}
        if kind is str:
            return {KIND: "str", **_binary(value.encode(errors="surrogatepass"))}
        if kind is Tensor:
            return self._tensor(value, at)
        self._level += 1
        if self._level > MOST_LEVELS:
            raise RecursionError
        if kind is list:
            packed: Any = self.items(value, at)
        elif kind is dict:
            packed = self._dict(value, at)
        elif kind is Piece or is_sharded(value):
            packed = self._piece(value, at)
        else:
            packer = np.generic if isinstance(value, np.generic) else kind
            if packer not in _PACKERS:
                raise _Refused(f"a {kind.__module__}.{kind.__qualname__} {_NOT_STORED}")
            packed = {KIND: _PACKERS[packer][0], **_PACKERS[packer][1](self, value, at)}
        self._level -= 1
        return packed

    def _item(self, key: Any, value: Any, at: str) -> Any:
        try:
            return self.pack_value(value, at)
        except _Refused as refused:
            refused.path = f"[{key!r}]{refused.path}"
            raise

    def items(self, values: Iterable[Any], at: str) -> list[Any]:
        """Return the items of a sequence."""
        return [self._item(i, value, f"{at}/{i}") for i, value in enumerate(values)]

    def pairs(self, values: Mapping[Any, Any], at: str) -> list[Any]:
        """Return the items of a mapping whose keys may be anything."""
        return [
            [self.pack_value(key, f"{at}/{i}/0"), self._item(key, value, f"{at}/{i}/1")]
            for i, (key, value) in enumerate(values.items())
        ]

    def _dict(self, values: Mapping[Any, Any], at: str) -> dict[str, Any]:
        are_texts = set(map(type, values)) <= {str} and ("".join(values).isascii() or all(map(_is_plain, values)))
        if KIND in values or not are_texts:
            return {KIND: "dict", "items": self.pairs(values, f"{at}/items")}
        return {
            key: value if _is_plain(value) else self._item(key, value, f"{at}/{_escaped(key)}")
            for key, value in values.items()
        }

    def _tensor(self, tensor: Tensor, at: str) -> dict[str, Any]:
        if tensor.is_meta:
            raise _Refused(f"a tensor without data (device meta) {_NOT_STORED}")
        if not is_dense(tensor):
            return self._sparse(tensor.detach(), at)
        packed: dict[str, Any] = {KIND: "tensor", "key": at}
        if tensor.is_complex():
            packed["dtype"] = _name(tensor.dtype)
            tensor = torch.view_as_real(tensor.detach().resolve_conj())
        elif not is_file_type(tensor.dtype):
            packed["dtype"] = _name(tensor.dtype)
            if tensor.itemsize > 1:
                raise _Refused(f"a tensor of {tensor.dtype} {_NOT_STORED}")
            tensor = tensor.view(torch.uint8)
        usual = row_major(tensor.shape)
        # Without overlaps and gaps, as what is written is a copy.
        if tensor.stride() != usual and (strides := torch.empty_like(tensor, device="meta").stride()) != usual:
            packed["strides"] = strides
        self.tensors[at] = tensor
        return packed

    def _piece(self, value: Any, at: str) -> dict[str, Any]:
        piece = piece_of(value)
        if piece is None or not fits_file(piece.tensor):
            raise _Refused(f"a tensor of {value.dtype} that is spread over ranks {_NOT_STORED}")
        self.pieces[at] = piece
        return {KIND: "pieces", "key": at}

    def _sparse(self, tensor: Tensor, at: str) -> dict[str, Any]:
        layout = _name(tensor.layout)
        plain: dict[str, Any] = {}
        if layout == "sparse_coo":
            plain["is_coalesced"] = tensor.is_coalesced()
            held = {"indices": tensor._indices(), "values": tensor._values()}
        elif layout in _COMPRESSED:
            _, pointers, indices = _COMPRESSED[layout]
            held = {"pointers": pointers(tensor), "indices": indices(tensor), "values": tensor.values()}
        else:
            what = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else layout
            raise _Refused(f"a tensor that is {what} {_NOT_STORED}")
        return {
            KIND: layout,
            "shape": list(tensor.shape),
            **plain,
            **{name: self._tensor(part, f"{at}/{name}") for name, part in held.items()},
        }

    def array(self, value: Any, at: str) -> dict[str, Any]:
        """Return an array: as a tensor if there is one of its type, else as bytes of numpy."""
        if value.dtype.hasobject:
            raise _Refused(f"an array of Python objects {_NOT_STORED}")
        if value.dtype.name not in _NUMBERS or not value.dtype.isnative:
            return _npy(value)
        is_plain = value.flags.writeable and all(step >= 0 and step % value.itemsize == 0 for step in value.strides)
        return {"tensor": self._tensor(torch.from_numpy(value if is_plain else value.copy()), f"{at}/tensor")}

    def number(self, value: Any, at: str) -> dict[str, Any]:
        """Return a scalar of numpy."""
        name = value.dtype.name
        if name in _NUMBERS and math.isfinite(value):
            return {"dtype": name, "value": value.item()}
        return _npy(np.asarray(value))

    def default_dict(self, value: defaultdict[Any, Any], at: str) -> dict[str, Any]:
        """Return a dict with its default, which must be one of Python's types."""
        name = getattr(value.default_factory, "__name__", "None")
        if _FACTORIES.get(name, _npy) is not value.default_factory:
            raise _Refused(f"a defaultdict of {name} {_NOT_STORED}")
        return {"factory": name, "items": self.pairs(value, f"{at}/items")}

    def parameter(self, value: nn.Parameter, at: str) -> dict[str, Any]:
        """Return a parameter."""
        return {"data": self._tensor(value.detach(), f"{at}/data"), "requires_grad": value.requires_grad}


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _is_plain(value: Any) -> bool:
    """Whether a value is the same in JSON: texts of Python may have surrogates, which it cannot hold."""
    kind = type(value)
    if kind is int:
        return bool(-_INT64 <= value < _INT64)
    if kind is float:
        return math.isfinite(value)
    if kind is not str:
        return value is None or kind is bool
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _non_finite(value: float) -> str:
    bits = int.from_bytes(struct.pack(">d", value))
    return f"nan({bits:016x})" if math.isnan(value) and bits != _NAN_BITS else str(value)


def _binary(value: bytes | bytearray) -> dict[str, str]:
    return {"base64": b64encode(value).decode()}


def _npy(array: Any) -> dict[str, str]:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return {"npy": b64encode(file.getvalue()).decode()}


def _pack_items(packer: Packer, value: Iterable[Any], at: str) -> dict[str, Any]:
    return {"items": packer.items(value, f"{at}/items")}


def _pack_pairs(packer: Packer, value: Mapping[Any, Any], at: str) -> dict[str, Any]:
    return {"items": packer.pairs(value, f"{at}/items")}


def _pack_name(packer: Packer, value: object, at: str) -> dict[str, Any]:
    return {"name": _name(value)}


_PACKERS: dict[type, tuple[str, Callable[[Packer, Any, str], dict[str, Any]]]] = {
    tuple: ("tuple", _pack_items),
    set: ("set", _pack_items),
    frozenset: ("frozenset", _pack_items),
    deque: ("deque", lambda packer, value, at: {**_pack_items(packer, value, at), "maxlen": value.maxlen}),
    OrderedDict: ("OrderedDict", _pack_pairs),
    Counter: ("Counter", _pack_pairs),
    defaultdict: ("defaultdict", Packer.default_dict),
    bytes: ("bytes", lambda packer, value, at: _binary(value)),
    bytearray: ("bytearray", lambda packer, value, at: _binary(value)),
    complex: ("complex", lambda packer, value, at: {"items": packer.items((value.real, value.imag), at)}),
    torch.Size: ("Size", lambda packer, value, at: {"items": list(value)}),
    torch.dtype: ("dtype", _pack_name),
    torch.device: ("device", _pack_name),
    type(Path()): ("Path", lambda packer, value, at: {"path": packer.pack_value(str(value), at)}),
    nn.Parameter: ("Parameter", Packer.parameter),
    np.ndarray: ("ndarray", Packer.array),
    np.generic: ("number", Packer.number),
}


def unpack(document: Any, tensors: Mapping[str, Any]) -> Any:
    """Return what was packed, in memory of its own.

    Args:
        document: The values of JSON.
        tensors: Exactly the tensors that it refers to, by key. Those that were spread over ranks may be anything that
            stands for them, and are returned as they are.

    Raises:
        ValueError: It was not packed by this version.
    """
    unpacker = _Unpacker(tensors)
    found = unpacker.unpack(document)
    if unpacker.unused:
        raise ValueError(f"it does not refer to the tensor {next(iter(unpacker.unused))[:100]!r}")
    return found


class _Unpacker:
    """Unpacks a document, in which nothing is trusted.

    Attributes:
        unused: The tensors that were not referred to yet.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.unused = dict(tensors)

    def unpack(self, packed: Any) -> Any:
        kind = type(packed)
        if kind is list:
            return [self.unpack(item) for item in packed]
        if kind is not dict:
            return packed
        if KIND not in packed:
            return {key: self.unpack(value) for key, value in packed.items()}
        fields = {key: value for key, value in packed.items() if key != KIND}
        name = packed[KIND]
        if not isinstance(name, str) or name not in _UNPACKERS:
            raise ValueError(f"it has a value of an unknown type, {str(name)[:50]!r}")
        try:
            return _UNPACKERS[name](self, **fields)
        except (TypeError, AttributeError, KeyError, RuntimeError, OverflowError, re.error) as error:
            if isinstance(error, RecursionError):
                raise
            line = (str(error).splitlines() or [""])[0]
            raise ValueError(f"it has a {name} that is not one ({line[:150]})") from error

    def tensor(self, key: str, dtype: str | None = None, strides: list[int] | None = None) -> Tensor:
        stored = self.pieces(key)
        if not isinstance(stored, Tensor):
            raise TypeError("it is in pieces")
        found = torch.empty_strided(stored.shape, _checked(stored.shape, strides), dtype=stored.dtype).copy_(stored)
        if dtype is None:
            return found
        wanted = _DTYPES[dtype]
        if found.dtype == torch.uint8 and wanted.itemsize == 1:
            return found.view(wanted)
        found = torch.view_as_complex(found)
        if found.dtype != wanted:
            raise TypeError(f"it is stored as {found.dtype}")
        return found

    def pieces(self, key: str) -> Any:
        if key not in self.unused:
            raise ValueError(f"it refers to a tensor that is missing, or has another place, {str(key)[:100]!r}")
        return self.unused.pop(key)

    def part(self, packed: Any) -> Tensor:
        found = self.unpack(packed)
        if type(found) is not Tensor:
            raise TypeError("a tensor is needed")
        return found

    def pairs(self, items: list[Any]) -> list[tuple[Any, Any]]:
        return [(self.unpack(key), self.unpack(value)) for key, value in items]

    def array(self, npy: str | None = None, tensor: Any = None) -> Any:
        if npy is None:
            return self.part(tensor).numpy()
        return np.lib.format.read_array(io.BytesIO(b64decode(npy, validate=True)), allow_pickle=False)

    def number(self, npy: str | None = None, dtype: str = "", value: Any = None) -> Any:
        return self.array(npy)[()] if npy is not None else _NUMBERS[dtype](value)

    def sparse(self, shape: list[int], indices: Any, values: Any, is_coalesced: bool) -> Tensor:
        held = self.part(indices), self.part(values)
        return torch.sparse_coo_tensor(*held, shape, is_coalesced=is_coalesced, check_invariants=True)

    @staticmethod
    def compressed(
        layout: torch.layout, self: "_Unpacker", shape: list[int], pointers: Any, indices: Any, values: Any
    ) -> Tensor:
        held = self.part(pointers), self.part(indices), self.part(values)
        return torch.sparse_compressed_tensor(*held, size=shape, layout=layout, check_invariants=True)


def _checked(shape: torch.Size, strides: list[int] | None) -> tuple[int, ...]:
    """Return the strides of a tensor, which must be those of memory without overlaps and gaps."""
    if strides is None:
        return row_major(shape)
    steps = sorted((step, size) for size, step in zip(shape, strides, strict=True) if size > 1)
    if any(type(step) is not int or step < 0 for step in strides):
        raise TypeError("strides are numbers")
    expected = 1
    for step, size in steps:
        if step != expected and 0 not in shape:
            raise TypeError("strides have no gaps")
        expected *= size
    return tuple(strides)


def _float(value: str) -> float:
    match = _NAN.fullmatch(value)
    return struct.unpack(">d", bytes.fromhex(match[1]))[0] if match else float(value)


def _from_binary(base64: str) -> bytes:
    return b64decode(base64, validate=True)


_UNPACKERS: dict[str, Callable[..., Any]] = {
    "float": lambda self, value: _float(value),
    "int": lambda self, value: int(value, 16),
    "str": lambda self, base64: _from_binary(base64).decode(errors="surrogatepass"),
    "tensor": _Unpacker.tensor,
    "pieces": _Unpacker.pieces,
    "dict": lambda self, items: dict(self.pairs(items)),
    "tuple": lambda self, items: tuple(self.unpack(items)),
    "set": lambda self, items: set(self.unpack(items)),
    "frozenset": lambda self, items: frozenset(self.unpack(items)),
    "deque": lambda self, items, maxlen: deque(self.unpack(items), maxlen),
    "OrderedDict": lambda self, items: OrderedDict(self.pairs(items)),
    "Counter": lambda self, items: Counter(dict(self.pairs(items))),
    "defaultdict": lambda self, factory, items: defaultdict(_FACTORIES[factory], self.pairs(items)),
    "bytes": lambda self, base64: _from_binary(base64),
    "bytearray": lambda self, base64: bytearray(_from_binary(base64)),
    "complex": lambda self, items: complex(*self.unpack(items)),
    "Size": lambda self, items: torch.Size(items),
    "dtype": lambda self, name: _DTYPES[name],
    "device": lambda self, name: torch.device(name),
    "Path": lambda self, path: Path(self.unpack(path)),
    "Parameter": lambda self, data, requires_grad: nn.Parameter(self.part(data), requires_grad),
    "ndarray": _Unpacker.array,
    "number": _Unpacker.number,
    "sparse_coo": _Unpacker.sparse,
    **{name: partial(_Unpacker.compressed, layout) for name, (layout, *_) in _COMPRESSED.items()},
}
