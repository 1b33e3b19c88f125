"""Adds up tensors over the parts of all ranks, in the order of ``PartTree``: the same bits on any number of ranks."""

from collections.abc import Iterator, Mapping, Sequence
from operator import add
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ksuit_runner.distributed.part_tree import Node, PartTree, nodes_of
from ksuit_runner.distributed.ranks import Ranks, all_gather
from ksuit_runner.tensors.foreach import add_all, copy_all

_ALIGNMENT = 16  # bytes
# Changes no addend, not even a negative zero: it stands for what a rank does not have.
_NEUTRAL = -0.0
_LAYOUTS = 2  # as many as optimizers that take turns, mostly
_SUMMABLE = (torch.float32, torch.float64)  # by gloo

Sums = Sequence[Tensor | None]


class TreeExchange:
    """The sums of tensors over the parts of all ranks, and of numbers over the ranks.

    Small tensors all go to all ranks, together with the numbers: one exchange. Large ones follow in buckets: each rank
    adds up its share of a bucket, and passes the sums on, while the next bucket is filled.

    Args:
        ranks: The ranks.
        like: Tensors like those to be added up.
        parts: Number of parts, over all ranks.
        numbers: How many numbers there are.
        bucket_bytes: About how much is exchanged at once.
        small_bytes: How much a rank sends at most for all of it to go to all ranks.
    """

    def __init__(
        self, ranks: Ranks, like: Sequence[Tensor], parts: int, numbers: int, bucket_bytes: int, small_bytes: int
    ) -> None:
        self._ranks = ranks
        self._like = like
        self._parts = parts
        self._bucket_bytes = bucket_bytes
        owned = [ranks.own(parts, rank) for rank in range(ranks.size)]
        self._nodes = [list(nodes_of(own.start, own.stop, parts)) for own in owned]
        self._own_nodes = self._nodes[ranks.rank]
        slots = max(map(len, self._nodes))
        head, block = _aligned(8 * numbers + slots * (1 + len(like))), sum(map(_size, like))
        is_small = slots * block <= small_bytes and all(tensor.device.type == "cpu" for tensor in like)
        length = head + (slots * block if is_small else 0)
        self._message = torch.zeros(1, length, dtype=torch.uint8)
        self._messages = torch.zeros(ranks.size, length, dtype=torch.uint8)
        self._numbers, self._has = _read_head(self._message, numbers, slots, len(like))
        self._all_numbers, self._all_have = _read_head(self._messages, numbers, slots, len(like))
        starts = range(head, length, block) if is_small and block else ()
        self._slots = [_cut(self._message[0, start : start + block], like) for start in starts]
        self._all_slots = [[_cut(row[start : start + block], like) for start in starts] for row in self._messages]
        self._is_small = is_small
        self._layouts: dict[tuple[int, ...], list[_Bucket]] = {}  # by which of the tensors any rank has

    def add_up(self, nodes: Mapping[Node, Sums], numbers: Sequence[float]) -> tuple[list[Tensor | None], list[float]]:
        """Return the sums, see ``Strategy.reduce``; what is in the nodes may be changed.

        All sums are None where a rank lacks a node of its parts.
        """
        held = [nodes[node] for node in self._own_nodes] if nodes.keys() >= set(self._own_nodes) else []
        self._numbers[0] = numbers
        self._has[0] = False
        for slot, tensors in enumerate(held):
            self._has[0, slot, 0] = True
            self._has[0, slot, 1:] = [tensor is not None for tensor in tensors]
        found = self._add_small(held) if self._is_small else self._add_large(held)
        tree = PartTree[Any](self._ranks.size, add)
        for rank, row in enumerate(self._all_numbers):
            tree.put(Node(0, rank), row)
        return found, tree.total.tolist()

    def _add_small(self, held: Sequence[Sums]) -> list[Tensor | None]:
        for views, tensors in zip(self._slots, held, strict=False):
            _fill(views, tensors)
        self._exchange_messages()
        found: list[Tensor | None] = [None] * len(self._like)
        if union := self._read_union():
            tree = PartTree[Sequence[Tensor]](self._parts, add_all)
            for nodes, slots in zip(self._nodes, self._all_slots, strict=True):
                for node, views in zip(nodes, slots, strict=False):
                    tree.put(node, [views[index] for index in union])
            for index, total in zip(union, tree.total, strict=True):
                found[index] = total
        return found

    def _add_large(self, held: Sequence[Sums]) -> list[Tensor | None]:
        self._exchange_messages()
        found: list[Tensor | None] = [None] * len(self._like)
        if union := self._read_union():
            found = list(held[0]) if held else found
            buckets = self._layout(union)
            for bucket in buckets:
                bucket.start(held)
            for bucket in buckets:
                bucket.add_up()
            for bucket in buckets:
                bucket.finish(found)
        return found

    def _exchange_messages(self) -> None:
        self._ranks.finish(self._ranks.start(lambda: all_gather(self._messages, self._message, async_op=True)))

    def _read_union(self) -> tuple[int, ...]:
        """Return which tensors any rank has; none if a rank lacks one of its nodes."""
        if not all(self._all_have[rank, : len(nodes), 0].all() for rank, nodes in enumerate(self._nodes)):
            return ()
        return tuple(self._all_have[:, :, 1:].any(axis=(0, 1)).nonzero()[0].tolist())

    def _layout(self, union: tuple[int, ...]) -> "list[_Bucket]":
        if union not in self._layouts:
            if len(self._layouts) == _LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            groups = _grouped(union, self._like, self._bucket_bytes)
            self._layouts[union] = [
                _Bucket(self._ranks, group, self._like, self._nodes, self._parts) for group in groups
            ]
        return self._layouts[union]


class _Bucket:
    """Tensors of one dtype and device that are exchanged together.

    Args:
        ranks: The ranks.
        indices: Which tensors.
        like: Tensors like all of them.
        nodes: The nodes of each rank.
        parts: Number of parts, over all ranks.
    """

    def __init__(
        self, ranks: Ranks, indices: Sequence[int], like: Sequence[Tensor], nodes: Sequence[Sequence[Node]], parts: int
    ) -> None:
        self._ranks, self._indices, self._nodes, self._parts = ranks, indices, nodes, parts
        tensors = [like[index] for index in indices]
        self._dtype = tensors[0].dtype
        self._own = len(nodes[ranks.rank])
        self._adds_itself = ranks.size > 2 or self._dtype not in _SUMMABLE or any(len(each) != 1 for each in nodes)
        self._share = _aligned(-(-sum(map(_size, tensors)) // ranks.size))  # bytes that a rank adds up
        length = ranks.size * self._share
        self._sent = torch.zeros(max(1, self._own), length, dtype=torch.uint8, device=tensors[0].device)
        self._slots = [_cut(row, tensors) for row in self._sent]
        if self._adds_itself:
            self._received = self._sent.new_empty(sum(map(len, nodes)) * self._share)
        self._work: Any = None

    def start(self, held: Sequence[Sums]) -> None:
        """Copy what this rank has into the bucket, and begin to exchange it."""
        for views, tensors in zip(self._slots, held, strict=False):
            _fill(views, [tensors[index] for index in self._indices])
        if not self._adds_itself:
            flat = self._sent[0].view(self._dtype)
            self._work = self._ranks.start(lambda: dist.all_reduce(flat, async_op=True))
            return
        by_rank = self._sent[: self._own].view(self._own, self._ranks.size, self._share).transpose(0, 1)
        sent = by_rank.reshape(-1)  # a copy if there are several nodes
        output_sizes = [len(nodes) * self._share for nodes in self._nodes]
        input_sizes = [self._own * self._share] * self._ranks.size
        self._work = self._ranks.start(
            lambda: dist.all_to_all_single(self._received, sent, output_sizes, input_sizes, async_op=True)
        )

    def add_up(self) -> None:
        """Add up this rank's share, and begin to pass the sums on."""
        if not self._adds_itself:
            return
        self._ranks.finish(self._work, self._sent.device)
        addends = iter(self._received.view(self._dtype).view(-1, self._share // self._dtype.itemsize))
        tree = PartTree[Tensor](self._parts, Tensor.add_)
        for nodes in self._nodes:
            for node in nodes:
                tree.put(node, next(addends))
        total = tree.total.view(torch.uint8)
        self._work = self._ranks.start(lambda: all_gather(self._sent[0], total, async_op=True))

    def finish(self, found: list[Tensor | None]) -> None:
        """Wait for the sums, and copy them into the tensors that were found on this rank, or new ones."""
        self._ranks.finish(self._work, self._sent.device)
        views, targets = self._slots[0], []
        for view, index in zip(views, self._indices, strict=True):
            target = found[index]
            found[index] = target = torch.empty_like(view) if target is None else target
            targets.append(target)
        copy_all(targets, views)


def _read_head(messages: Tensor, numbers: int, slots: int, tensors: int) -> tuple[Any, Any]:
    """Return views of messages, one in each row: their numbers, and which tensors are in each slot.

    The first entry of a slot is whether anything is in it.
    """
    rows, start = messages.numpy(), 8 * numbers
    flags = rows[:, start : start + slots * (1 + tensors)].view(np.bool_)
    return rows[:, :start].view(np.float64), flags.reshape(len(rows), slots, 1 + tensors)


def _cut(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a piece of memory that are like these tensors; strides are kept if they leave no gaps."""
    views, start = [], 0
    for tensor in like:
        values = memory[start : start + tensor.numel() * tensor.itemsize].view(tensor.dtype)
        views.append(values.as_strided(tensor.size(), torch.empty_like(tensor, device="meta").stride()))
        start += _size(tensor)
    return views


def _fill(views: Sequence[Tensor], tensors: Sums) -> None:
    there = [(view, tensor) for view, tensor in zip(views, tensors, strict=True) if tensor is not None]
    if there:
        copy_all([view for view, _ in there], [tensor for _, tensor in there])
    if len(there) < len(views):
        for view, tensor in zip(views, tensors, strict=True):
            if tensor is None:
                view.fill_(_NEUTRAL)


def _grouped(indices: Sequence[int], like: Sequence[Tensor], limit: int) -> Iterator[list[int]]:
    """Yield groups of indices: one dtype and device, and not much above the limit in bytes."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for index in indices:
        kind = like[index].dtype, like[index].device
        groups.setdefault(kind, []).append(index)
        sizes[kind] = sizes.get(kind, 0) + _size(like[index])
        if sizes[kind] >= limit:
            yield groups.pop(kind)
            del sizes[kind]
    yield from groups.values()


def _size(tensor: Tensor) -> int:
    return _aligned(tensor.numel() * tensor.itemsize)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
