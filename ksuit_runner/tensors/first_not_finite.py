"""Which of many tensors is the first that is not finite."""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor


class NotFinite(NamedTuple):
    """What was not finite: in which update, what it was, and what was looked at right before it, if anything."""

    update: int
    what: str
    before: str

    def __str__(self) -> str:
        before = f", right after {self.before}" if self.before else ""
        return f"update {self.update}: {self.what} is the first that is not finite{before}"


class FirstNotFinite:
    """Finds the first of many tensors that is not finite, without waiting for the device until it is asked.

    It holds a number for each tensor of one update, and of all updates before only what was found in them.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._update = 0
        self._names: list[str] = []
        self._largest: list[Tensor] = []
        self._rows: list[list[str]] = []  # the names of an update, once for all that have the same
        self._found: Tensor | None = None  # update, row, place in the row; all -1 if there was nothing

    def begin(self, update: int) -> None:
        """Say to which update belongs what is looked at from now on."""
        if update != self._update:
            self._close_update()
            self._update = update

    def look(self, what: str, tensor: Tensor) -> None:
        """Look at a tensor, unless it is sparse, empty or has no floating-point numbers."""
        is_number = tensor.is_floating_point() or tensor.is_complex()
        if is_number and tensor.layout is torch.strided and tensor.numel():
            largest: Tensor = torch.linalg.vector_norm(tensor.detach(), inf)
            self._names.append(what)
            self._largest.append(largest.float())

    def _close_update(self) -> None:
        if not self._names:
            return
        if self._names not in self._rows:
            self._rows.append(self._names)
        is_bad = ~torch.stack(self._largest).isfinite()
        place = is_bad.int().argmax()
        update, row = (torch.full_like(place, number) for number in (self._update, self._rows.index(self._names)))
        found = torch.where(is_bad.any(), torch.stack([update, row, place]), -1)
        self._found = found if self._found is None else torch.where(self._found < 0, found, self._found)
        self._names, self._largest = [], []

    def take(self) -> NotFinite | None:
        """Wait for the device, and return what was not finite first since the last time; None if there was nothing."""
        self._close_update()
        update, row, place = (-1, -1, -1) if self._found is None else self._found.tolist()
        names = self._rows[row] if update >= 0 else []
        self._start()
        return NotFinite(update, names[place], names[place - 1] if place else "") if names else None
