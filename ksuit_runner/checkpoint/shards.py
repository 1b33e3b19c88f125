"""What each rank writes of a checkpoint: its pieces of tensors that are spread over the ranks, and states of its own.

``rank-3.safetensors`` holds the values. ``rank-3.json`` says which tensor of which file each of them is a piece of, and
holds the states of callbacks that differ between ranks. A tensor is read from all ranks' files together, in any part.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ksuit_runner.checkpoint.manifest import Fingerprint, fingerprint, rank_file, rank_of, write_file
from ksuit_runner.checkpoint.state_types import unpack
from ksuit_runner.checkpoint.tensor_file import DTYPES, parts
from ksuit_runner.distributed.pieces import Piece, StoredTensor, block_at
from ksuit_runner.system.atomic_files import sync
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_file

_MOST_BYTES = 200_000_000  # of a rank's JSON: about 2 million pieces
_MOST_ELEMENTS = 1 << 60
_Number = Annotated[int, msgspec.Meta(ge=0, le=_MOST_ELEMENTS)]
_Numbers = Annotated[tuple[_Number, ...], msgspec.Meta(max_length=32)]


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a piece belongs.

    Attributes:
        offset: Position of its first element in the whole tensor, one number for each dimension.
        shape: Shape of the whole tensor.
    """

    offset: _Numbers
    shape: _Numbers


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    checkpoint: str
    rank: int
    ranks: int
    pieces: dict[str, dict[str, Position]]
    states: dict[str, Any]


@dataclass
class Shard:
    """What a rank writes of a checkpoint besides what all ranks have.

    Attributes:
        positions: Where its pieces belong, by the file of the whole tensor (without suffix) and by name. A file with a
            tensor that is spread over the ranks is there on every rank, also on one that stores no piece of it.
        states: The states of callbacks that differ between ranks, packed, by name.
        tensors: The values of the pieces, and the tensors of the states.
    """

    positions: dict[str, dict[str, Position]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any; the same on all ranks."""
        return bool(self.positions or self.states)

    def add(self, file: str, name: str, piece: Piece) -> None:
        """Add a piece of a tensor."""
        positions = self.positions.setdefault(file, {})
        if not piece.is_copy:
            positions[name] = Position(tuple(piece.offset), tuple(piece.shape))
            self.tensors[_key(file, name)] = piece.tensor

    def outline(self) -> dict[str, dict[str, list[list[int]]]]:
        """Return offset, shape of the whole, and own shape of every piece, by file and name; see ``find_flaw``."""
        return {
            file: {
                name: [list(at.offset), list(at.shape), list(self.tensors[_key(file, name)].shape)]
                for name, at in positions.items()
            }
            for file, positions in self.positions.items()
        }

    def write(self, folder: Path, checkpoint: str, rank: int, ranks: int) -> dict[str, Fingerprint]:
        """Write the files of a rank, and return their fingerprints once they are on the disk and read back.

        Raises:
            OSError: They could not be written.
        """
        index = _Index(checkpoint, rank, ranks, self.positions, self.states)
        contents = {"safetensors": parts(self.tensors), "json": [msgspec.json.encode(index)]}
        written = {}
        for suffix, content in contents.items():
            path = folder / rank_file(rank, suffix)
            written[path.name] = write_file(path, content)
            sync(path)
            if fingerprint(path) != written[path.name]:
                raise OSError(f"{path.name} reads back wrong")
        return written


def find_flaw(outlines: Sequence[Mapping[str, Mapping[str, Sequence[Sequence[int]]]]]) -> str | None:
    """Return why the pieces of all ranks do not make whole tensors, or None if they do.

    Args:
        outlines: What ``Shard.outline`` returns on each rank.
    """
    found: dict[tuple[str, str], list[_Block]] = defaultdict(list)
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = defaultdict(set)
    for rank, outline in enumerate(outlines):
        for file, pieces in outline.items():
            for name, (offset, shape, size) in pieces.items():
                found[file, name].append(_Block(rank, tuple(offset), tuple(size)))
                shapes[file, name].add(tuple(shape))
    for (file, name), blocks in found.items():
        shape, *others = shapes[file, name]
        problem = "have several shapes of the whole" if others else _flaw(shape, blocks)
        if problem is not None:
            return f"{file}: the pieces of {name!r} {problem}"
    return None


class _Block(NamedTuple):
    rank: int
    offset: tuple[int, ...]
    size: tuple[int, ...]


class _SpreadTensor(StoredTensor):
    """A tensor in the files of several ranks."""

    def __init__(self, shards: "Shards", key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self.blocks: list[_Block] = []
        self._shards, self._key = shards, key

    def read(self, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return a block, see ``StoredTensor``."""
        found = torch.empty(tuple(size), dtype=self.dtype)
        for block in self.blocks:
            starts = [max(one, other) for one, other in zip(offset, block.offset, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(offset, size, block.offset, block.size, strict=True)]
            if all(start < end for start, end in zip(starts, ends, strict=True)):
                source, target = _slices(starts, ends, block.offset), _slices(starts, ends, offset)
                found[target] = self._shards.values(block.rank).get_slice(self._key)[source]
        return found


class FileTensor(StoredTensor):
    """A tensor that is whole in a safetensors file.

    Args:
        file: The opened file.
        name: Its name.
    """

    def __init__(self, file: Any, name: str) -> None:
        self._values = file.get_slice(name)
        self.shape, self.dtype = torch.Size(self._values.get_shape()), DTYPES[self._values.get_dtype()]

    def read(self, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return a block, see ``StoredTensor``."""
        found: Tensor = self._values[block_at(offset, size)]
        return found


class Shards:
    """The files of all ranks of a checkpoint, of which every piece has its place and every tensor all its pieces.

    Args:
        folder: Folder of the checkpoint.
        files: Names of all files of the checkpoint.
        checkpoint: Its name.

    Attributes:
        tensors: The tensors by the file that they belong to (without suffix) and by name; read when they are needed.

    Raises:
        UnsafeFileError: A file is missing or damaged, belongs to something else, or does not fit the others.
    """

    def __init__(self, folder: Path, files: Collection[str], checkpoint: str) -> None:
        self.tensors: dict[str, dict[str, StoredTensor]] = {}
        self._folder = folder
        self._opened: dict[int, Any] = {}
        self._ranks = _count_ranks(files)
        self._states: list[dict[str, Any]] = []
        spread: dict[tuple[str, str], _SpreadTensor] = {}
        for rank in range(self._ranks):
            index = self._read_index(rank, checkpoint)
            self._states.append(index.states)
            with _explained(rank_file(rank, "safetensors")):
                self._place(rank, index, spread)
        for (file, name), tensor in spread.items():
            if f"{file}.safetensors" not in files:
                raise UnsafeFileError(f"{file}.safetensors is missing, and there are pieces of {name[:100]!r} in it")
            if (problem := _flaw(tensor.shape, tensor.blocks)) is not None:
                raise UnsafeFileError(f"the pieces of {file}: {name[:100]!r} {problem}")
            self.tensors.setdefault(file, {})[name] = tensor

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._ranks > 0

    def values(self, rank: int) -> Any:
        """Return the opened file with the values of a rank."""
        if rank not in self._opened:
            self._opened[rank] = safe_open(self._folder / rank_file(rank, "safetensors"), "pt")
        return self._opened[rank]

    def states(self) -> list[dict[str, Any]]:
        """Return the states of callbacks that differ between ranks, by name, for each rank; none if none of them has.

        Raises:
            UnsafeFileError: One was not packed by this version.
        """
        found = []
        for rank, states in enumerate(self._states):
            with _explained(rank_file(rank, "json")):
                found.append(unpack(states, dict(self._tensors_of_states(rank))))
                if not isinstance(found[-1], dict) or found[-1].keys() != found[0].keys():
                    raise ValueError("has the states of other callbacks than the ranks before")
        return found if found and found[0] else []

    def _tensors_of_states(self, rank: int) -> Iterator[tuple[str, Tensor]]:
        values = self.values(rank)
        for key in values.keys():  # noqa: SIM118 (it is no mapping)
            if key.startswith("/"):
                yield key, values.get_tensor(key)

    def _read_index(self, rank: int, checkpoint: str) -> _Index:
        name = rank_file(rank, "json")
        with _explained(name):
            if (size := check_file(self._folder / name, self._folder)) > _MOST_BYTES:
                raise UnsafeFileError(f"has {size:,} bytes, more than the {_MOST_BYTES:,} that are read")
            index = msgspec.json.decode((self._folder / name).read_bytes(), type=_Index)
            if (index.checkpoint, index.rank, index.ranks) != (checkpoint, rank, self._ranks):
                raise UnsafeFileError("belongs to another checkpoint")
        return index

    def _place(self, rank: int, index: _Index, spread: dict[tuple[str, str], _SpreadTensor]) -> None:
        values = self.values(rank)
        unused = {key for key in values.keys() if not key.startswith("/")}  # noqa: SIM118
        for file, positions in index.pieces.items():
            for name, position in positions.items():
                key = _key(file, name)
                if key not in unused:
                    raise UnsafeFileError(f"has no {key[:100]!r}")
                unused.remove(key)
                stored = values.get_slice(key)
                dtype, size = DTYPES[stored.get_dtype()], tuple(stored.get_shape())
                tensor = spread.setdefault((file, name), _SpreadTensor(self, key, position.shape, dtype))
                if (tensor.shape, tensor.dtype) != (position.shape, dtype):
                    raise UnsafeFileError(f"has another {key[:100]!r} than the ranks before")
                tensor.blocks.append(_Block(rank, position.offset, size))
        if unused:
            raise UnsafeFileError(f"has {min(unused)[:100]!r}, of which nothing says where it belongs")


class _explained:
    """Makes any error in reading a file one that names it."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, UnsafeFileError | SafetensorError | ValueError | KeyError | RecursionError):
            line = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UnsafeFileError(f"{self._file} {line}") from None


def _key(file: str, name: str) -> str:
    return f"{file}:{name}"  # no file has a colon in its name


def _count_ranks(files: Collection[str]) -> int:
    """Return of how many ranks there are files, which must be those of all ranks up to the last."""
    there = {file for file in files if rank_of(file) is not None}
    count = len(there) // 2
    wanted = {rank_file(rank, suffix) for rank in range(count) for suffix in ("json", "safetensors")}
    if there != wanted:
        raise UnsafeFileError(f"{min(there ^ wanted)} is missing, or one of no rank")
    return count


def _slices(starts: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start - at, end - at) for start, end, at in zip(starts, ends, origin, strict=True))


def _flaw(shape: Sequence[int], blocks: list[_Block]) -> str | None:
    """Return why pieces are not exactly a whole tensor, or None if they are."""
    if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        return f"are of a tensor of an absurd shape, {tuple(shape)}"
    for block in blocks:
        if not len(shape) == len(block.offset) == len(block.size):
            return f"do not have the dimensions of the whole, on rank {block.rank}"
        if any(at + size > end for at, size, end in zip(block.offset, block.size, shape, strict=True)):
            return f"leave the whole, on rank {block.rank}"
    blocks = [block for block in blocks if math.prod(block.size)]
    # Inside of the whole, as large as the whole together, and none overlapping another: then nothing is missing.
    if sum(math.prod(block.size) for block in blocks) != math.prod(shape):
        return "overlap, or do not cover the whole"
    return "overlap" if _overlap(blocks) else None


def _overlap(blocks: list[_Block]) -> bool:
    """Whether any two blocks overlap.

    They are swept along the dimension that they are cut in most: those that a block can overlap are then few.
    """
    if len(blocks) < 2:
        return False
    dimensions = range(len(blocks[0].offset))
    if not dimensions:
        return True
    along = max(dimensions, key=lambda dimension: len({block.offset[dimension] for block in blocks}))
    active: list[_Block] = []
    for block in sorted(blocks, key=lambda block: block.offset[along]):
        active = [other for other in active if other.offset[along] + other.size[along] > block.offset[along]]
        for other in active:
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(block.offset, block.size, other.offset, other.size, strict=True)
            ):
                return True
        active.append(block)
    return False
