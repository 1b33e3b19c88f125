"""Accumulates the gradients of losses whose counts are known only once they are computed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ksuit_runner.tensors.foreach import multiply_all
from ksuit_runner.trainer.losses import Count, Losses

_SHARED = ""  # key of the losses without a count: their shares of the batch are known beforehand


class GradientSums:
    """Turns the gradients of a batch's parts into those of the whole batch, whatever its losses count in each of them.

    A loss of the whole batch is the sum over its parts of count times mean, divided by the sum of the counts, which is
    known after the last part. So the gradients of count times mean are summed up, and divided at the end. Each loss
    with a count has sums and a backward pass of its own; with one such loss these are simply the gradients.

    Args:
        parameters: What gradients are with respect to.

    Attributes:
        parts: Number of parts of the batch.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.start(1)

    def start(self, parts: int) -> None:
        """Start with a batch of so many parts."""
        self.parts = parts
        self._held: str | None = None  # whose gradients the parameters hold
        self._sums: dict[str, list[Tensor | None]] = {}  # those of the others
        self._counts: dict[str, float] = {}
        self._scales: dict[str, float] = {}  # what a sum is divided by meanwhile: it stays about as large as the mean
        self._uncounted: dict[str, Tensor] = {}

    def add(self, losses: Losses, share: float, backward: Callable[[Tensor, bool], None]) -> None:
        """Compute the gradients of a part.

        Args:
            losses: Its losses, whose counts are numbers.
            share: Its share of the losses without a count.
            backward: Does the backward pass of a loss; it is told whether to retain the graph.
        """
        terms: dict[str, Tensor] = {}
        for name, term in losses.summands.items():
            count = losses.counts.get(name)
            if count is None:
                if share:
                    terms[_SHARED] = terms.get(_SHARED, 0.0) + term * share
            elif count:
                self._counts[name] = self._counts.get(name, 0.0) + float(count)
                terms[name] = term * (float(count) / self._scales.setdefault(name, float(count) * self.parts))
            else:
                self._uncounted[name] = term.detach()
        terms = {key: term for key, term in terms.items() if term.requires_grad}  # not of what is frozen
        for left, (key, term) in zip(reversed(range(len(terms))), terms.items(), strict=True):
            self._hold(key)
            backward(term, left > 0)

    def finish(self) -> list[Tensor]:
        """Leave the gradients of the whole batch at the parameters.

        Returns:
            The losses of which the whole batch has nothing: means over nothing.
        """
        held = [key for key in (*self._sums, self._held) if key is not None]
        for key in dict.fromkeys(held):
            self._hold(key)
            factor = self._scales[key] / self._counts[key] if key in self._counts else 1.0
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            if factor != 1.0 and gradients:
                multiply_all(gradients, torch.tensor(factor, device=gradients[0].device))
        for sums in self._sums.values():
            for parameter, gradient in zip(self._parameters, sums, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        uncounted = [term for name, term in self._uncounted.items() if name not in self._counts]
        self.start(1)
        return uncounted

    def _hold(self, key: str) -> None:
        """Let the parameters hold the sums of a loss."""
        if self._held == key:
            return
        if self._held is not None:
            self._sums[self._held] = [parameter.grad for parameter in self._parameters]
            found = self._sums.pop(key, [None] * len(self._parameters))
            for parameter, gradient in zip(self._parameters, found, strict=True):
                parameter.grad = gradient
        self._held = key


class TotalLoss:
    """The loss of a whole batch, from those of its parts: what its gradients are the gradients of.

    Args:
        parts: Number of parts of the batch.
    """

    def __init__(self, parts: int) -> None:
        self._is_split = parts > 1
        self._shared: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Count] = {}

    def add(self, losses: Losses, share: float) -> None:
        """Add the losses of a part, with its share of those without a count."""
        for name, term in losses.summands.items():
            count = losses.counts.get(name) if self._is_split else None
            if count is not None:
                value = term * count if count else torch.zeros_like(term)
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + count
            elif share:
                self._shared.append(term * share)

    def value(self) -> Tensor:
        """Return the loss, a scalar."""
        return torch.stack([*self._shared, *(self._sums[name] / self._counts[name] for name in self._sums)]).sum()
