"""Data parallel training: every rank has the whole model, and computes the gradients of its parts of each batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ksuit_runner.distributed.part_tree import Node, PartTree
from ksuit_runner.distributed.strategy import Strategy

Gradients = list[Tensor | None]


class DataParallel(Strategy):
    """Trains with a copy of the model on each rank: ``strategy=ddp``.

    The gradients are added up in the order of ``PartTree``, so that they are the same to the bit on any number of
    ranks, which those of torch's ``DistributedDataParallel`` are not.
    """

    name = "ddp"

    def reduce(  # noqa: D102
        self, nodes: Mapping[Node, Sequence[Tensor | None]], parts: int, word: Sequence[float]
    ) -> tuple[list[Tensor | None], list[float]]:
        if self.world.size == 1:
            return super().reduce(nodes, parts, word)
        keys = [list(node) for node in nodes]
        held = [[gradient is not None for gradient in gradients] for gradients in nodes.values()]
        words = self.world.gather([keys, held, list(word)])
        own = [gradient for gradients in nodes.values() for gradient in gradients if gradient is not None]
        tensors = self.world.gather_tensors(own)
        device = own[0].device if own else torch.device("cpu")
        tree = PartTree[Gradients](parts, _add)
        for (keys, held, _), found in zip(words, tensors, strict=True):
            rest = iter(found)
            for key, present in zip(keys, held, strict=True):
                tree.put(Node(*key), [next(rest).to(device) if there else None for there in present])
        return tree.total, [sum(values) for values in zip(*(word for _, _, word in words), strict=True)]


def _add(left: Gradients, right: Gradients) -> Gradients:
    return [
        one if other is None else other if one is None else one + other for one, other in zip(left, right, strict=True)
    ]
