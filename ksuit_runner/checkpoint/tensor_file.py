"""Safetensors files: which tensors fit into one, and its bytes, from the memory in which the tensors are."""

from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from ksuit_runner.distributed.pieces import StoredTensor, whole
from ksuit_runner.system.atomic_files import open_new, sync

METADATA = "__metadata__"
"""The one name that no tensor in a file can have."""
_ALIGNMENT = 8
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}

DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""Dtypes by their names in a file."""


_Piece = bytes | memoryview | Tensor | StoredTensor


class FixedTensors(dict[str, Tensor]):
    """Tensors of a file that stay where they are in memory, whatever is copied into them."""

    @cached_property
    def pieces(self) -> list[_Piece]:
        """The pieces of the file, found once."""
        return _pieces(self, {})


def fits_file(value: Any) -> bool:
    """Whether a safetensors file can hold a value of a ``state_dict``."""
    return isinstance(value, Tensor) and is_dense(value) and not value.is_meta and is_file_type(value.dtype)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is one block of plain numbers: not sparse, nested or quantized."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized


@lru_cache
def is_file_type(dtype: torch.dtype) -> bool:
    """Whether a file can hold tensors of a dtype, and the installed version of safetensors can read it."""
    try:
        return bool(safetensors.torch.load(b"".join(parts({"x": torch.empty((), dtype=dtype)}))))
    except Exception:
        return False


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | StoredTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file by itself: after a crash it is complete, or does not exist.

    Args:
        path: The file.
        tensors: Dense tensors by name.
        metadata: Texts for its header.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open_new(temporary) as file:
            for part in parts(tensors, metadata):
                file.buffer.write(part)
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def parts(
    tensors: Mapping[str, Tensor | StoredTensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the content of a file: its header, and the memory of one tensor after the other.

    Only a tensor that is not row-major is copied, and one that is stored elsewhere is read, when its turn comes.

    Args:
        tensors: Dense tensors by name.
        metadata: Texts for the header.
    """
    found = tensors.pieces if isinstance(tensors, FixedTensors) and not metadata else _pieces(tensors, metadata or {})
    for piece in found:
        yield piece if isinstance(piece, bytes | memoryview) else _memory(whole(piece).cpu().contiguous())


def _pieces(tensors: Mapping[str, Tensor | StoredTensor], metadata: Mapping[str, str]) -> list[_Piece]:
    """Return the header and the memory of every tensor, or the tensor itself, if it has to be copied or read."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # every tensor is aligned
    header: dict[str, Any] = {METADATA: {"format": "pt", **metadata}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.shape.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tuple(tensor.shape), "data_offsets": (start, end)}
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    pieces: list[_Piece] = [len(encoded).to_bytes(8, "little") + encoded]
    for _, tensor in ordered:
        if isinstance(tensor, StoredTensor) or not (tensor.is_cpu and tensor.is_contiguous()):
            pieces.append(tensor)
        else:
            pieces.append(_memory(tensor))
    return pieces


def _memory(tensor: Tensor) -> memoryview:
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
