"""The buffers of a batch that is computed in parts, such as running statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ksuit_runner.trainer.buffer_snapshot import BufferSnapshot

Changes = list[Tensor | None]


class PartBuffers:
    """Combines what the parts of a batch change in buffers; each part begins with them as before the update.

    Floating-point buffers, such as running statistics, change by the mean of the parts' changes. Integers count
    something, so their changes are added up, except for those of normalization layers, which count updates. A boolean
    is true after the update if it is true after any part. A buffer that a part replaces by one of another shape or type
    stays as the last part of this rank has left it.

    Args:
        snapshot: The buffers as they were before the update.
    """

    def __init__(self, snapshot: BufferSnapshot) -> None:
        self._snapshot = snapshot
        self._surveys = -1
        self._like: list[Tensor] = []
        self._references: dict[int, Tensor] = {}

    def start(self) -> None:
        """Start with an update, whose snapshot has been taken."""
        self._references = {}

    def like(self) -> list[Tensor]:
        """Return tensors of the shapes and types of the changes; the same list as before if these are the same."""
        if self._surveys != self._snapshot.surveys:
            self._surveys = self._snapshot.surveys
            like = [_like(before) for _, _, before in self._snapshot.targets()]
            if list(map(_kind, like)) != list(map(_kind, self._like)):
                self._like = like
        return self._like

    def reset(self) -> None:
        """Put the buffers back as they were before the update."""
        self._snapshot.reset()

    @property
    def count(self) -> int:
        """How many buffers there are."""
        return len(self._snapshot)

    @torch.no_grad()
    def changes(self) -> Changes:
        """Return what a part has changed, buffer by buffer, to be added up over the parts."""
        return [
            None if now is None else now.long() if now.dtype == torch.bool else now - self._reference(before)
            for now, before in self._snapshot.changes()
        ]

    @torch.no_grad()
    def apply(self, changes: Sequence[Tensor | None], parts: int) -> None:
        """Let the buffers have the changes of a whole batch.

        Args:
            changes: The sums over its parts.
            parts: How many parts have computed something.
        """
        for (name, buffer, before), change in zip(self._snapshot.targets(), changes, strict=True):
            if change is None or buffer is None or buffer.shape != before.shape:
                continue
            if before.dtype == torch.bool:
                buffer.copy_(change > 0)
            elif before.is_floating_point() or before.is_complex():
                buffer.copy_(self._reference(before) + change / parts)
            else:
                buffer.copy_(before + (change // parts if name == "num_batches_tracked" else change))

    def _reference(self, before: Tensor) -> Tensor:
        """Return values that differences can be taken to: an observer begins with infinity as its minimum."""
        if not before.is_floating_point():
            return before
        if id(before) not in self._references:
            self._references[id(before)] = torch.nan_to_num(before, 0.0, 0.0, 0.0)
        return self._references[id(before)]


def _like(buffer: Tensor | None) -> Tensor:
    if buffer is None:
        return torch.empty(0)
    return torch.empty_like(buffer, dtype=torch.int64 if buffer.dtype == torch.bool else None)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
