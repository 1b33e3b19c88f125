"""The losses of a training step: means by name, what each is a mean over, and the total that is minimized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ksuit_runner.errors import ConfigError, KsuitError, did_you_mean, named_type
from ksuit_runner.trainer.sums import Number, Total

Count = float | Tensor
"""The number of things that a loss is a mean over, such as samples or tokens."""

_WANTED = (
    "it has to return (losses, outputs), where losses is a scalar tensor, (mean, count), or a dict of such by name "
    "with a 'total'"
)


class Losses(dict[str, Tensor]):
    """The losses of a batch, or of a part of it, by name: scalars that are means, of which ``total`` is minimized.

    Attributes:
        counts: What losses are means over, by name, for those of which the training step says it.
        factors: Factors of the losses whose sum is the total; empty if the total is a loss of its own.
    """

    __slots__ = ("counts", "factors")
    counts: dict[str, Count]
    factors: Mapping[str, float]

    @property
    def summands(self) -> dict[str, Tensor]:
        """The terms that the total is the sum of, by the names of their losses."""
        return {name: self[name] * factor for name, factor in self.factors.items()} or {"total": self["total"]}

    def detach_(self) -> None:
        """Let go of their graph."""
        for name, loss in self.items():
            self[name] = loss.detach()

    def means(self, weight: Count, size: Count) -> Iterator[tuple[str, Tensor, Count]]:
        """Yield each loss that is not the sum of others, with its name and what it is a mean over.

        Args:
            weight: What the total, and the losses that it is the sum of, are means over where they do not say it.
            size: What other losses are means over where they do not say it: mostly the samples.
        """
        counts, factors = self.counts, self.factors
        for name, loss in self.items():
            is_total = name == "total"
            if not (is_total and factors):
                yield name, loss, counts.get(name, weight if is_total or name in factors else size)

    def flatten_(self) -> None:
        """Give tensors of one element the shape of a scalar, so that they can be stacked."""
        for values in (self, self.counts):
            for name, value in values.items():
                if isinstance(value, Tensor) and value.ndim:
                    values[name] = value.reshape(())

    def read_counts(self) -> None:
        """Read the counts that are on a device, in one transfer."""
        on_device = [name for name, count in self.counts.items() if isinstance(count, Tensor)]
        if on_device:
            stacked = torch.stack([torch.as_tensor(self.counts[name]).detach().float() for name in on_device])
            self.counts.update(zip(on_device, stacked.tolist(), strict=True))


class LossReader:
    """Reads what a training step has returned.

    Args:
        step: Name of the step, for messages.
        factors: ``trainer.loss_weights``: factors of the losses whose sum is the total.
    """

    def __init__(self, step: str, factors: Mapping[str, float]) -> None:
        self._step = step
        self._factors = factors
        self._has_checked = False

    def read(self, result: Any) -> tuple[Losses, Any]:
        """Return the losses and the outputs.

        Raises:
            KsuitError: It returned something else. The losses themselves are checked the first time.
        """
        if not isinstance(result, tuple) or len(result) != 2:
            raise KsuitError(f"{self._step} returns {named_type(result)}; {_WANTED}", path="trainer")
        given: Mapping[str, Any] = result[0]
        if type(given) is not dict and not isinstance(given, Mapping):
            given = {"total": given}
        losses = Losses(given)
        losses.counts, losses.factors = {}, self._factors
        for name, loss in given.items():
            if isinstance(loss, tuple) and len(loss) == 2:
                losses[name], losses.counts[name] = loss
        if not self._has_checked:
            self._check(losses)
        if losses.counts or self._factors:
            losses.flatten_()
        try:
            losses["total"] = sum(losses.summands.values(), torch.zeros(())) if self._factors else losses["total"]
        except KeyError:  # it has returned other losses before
            self._check(losses)
            raise
        if not self._has_checked:
            self._has_checked = True
            if torch.is_grad_enabled() and not losses["total"].requires_grad:
                raise KsuitError(
                    f"{self._step} returns a 'total' without a gradient with respect to any parameter", path="trainer"
                )
        return losses, result[1]

    def _check(self, losses: Losses) -> None:
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else named_type(loss)
                raise KsuitError(f"{self._step} returns {found} as '{name}'; {_WANTED}", path="trainer")
        for name, count in losses.counts.items():
            if not isinstance(count, (int, float)) and not (isinstance(count, Tensor) and count.numel() == 1):
                raise KsuitError(
                    f"{self._step} returns {named_type(count)} as the count of '{name}', which is a number or a "
                    "scalar tensor",
                    path="trainer",
                )
            if float(count) < 0:
                raise KsuitError(
                    f"{self._step} returns {float(count)} as the count of '{name}', which must not be negative",
                    path="trainer",
                )
        if not self._factors:
            if "total" not in losses:
                names = ", ".join(f"{name}: 1" for name in losses)
                hint = f": sum up its losses for it, or set 'trainer.loss_weights={{{names}}}'" if losses else ""
                raise KsuitError(f"{self._step} returns no 'total', which is what is minimized{hint}", path="trainer")
            return
        if "total" in losses:
            raise ConfigError(f"{self._step} returns a 'total' of its own", path="trainer.loss_weights")
        for name in self._factors:
            if name not in losses:
                raise ConfigError(
                    f"{self._step} returns no '{name}'. {did_you_mean(name, losses)}", path="trainer.loss_weights"
                )


class Adds(Protocol):
    """What sums and means are added to: ``Sums``, or ``Gathered`` in an evaluation."""

    def add(self, key: Any, value: Any, count: Count) -> None:
        """Add a sum over so many things."""

    def add_mean(self, key: Any, mean: Any, count: Count) -> None:
        """Add a mean over so many things; over nothing it is NaN, and adds nothing."""


def add_losses(
    sums: Adds, losses: Losses, weight: Count, size: Count, is_sum: bool = False, of: tuple[str, ...] = ()
) -> None:
    """Add the losses of a batch, or of a part of it, to sums over several.

    Args:
        sums: What they are added to, under ``(*of, name)``.
        losses: The losses.
        weight: See ``Losses.means``.
        size: See ``Losses.means``.
        is_sum: Whether the total is a sum over the samples, and not a mean.
        of: What begins their keys.
    """
    for name, loss, count in losses.means(weight, size):
        add_loss(sums, (*of, name), loss, count, is_sum and name == "total")


def add_loss(sums: Adds, key: tuple[str, ...], loss: Number, count: Count, is_sum: bool) -> None:
    """Add a loss, which is a sum or a mean over so many things, to sums over several batches."""
    if is_sum:
        sums.add(key, loss, count)
    else:
        sums.add_mean(key, loss, count)


def mean_losses(totals: Mapping[tuple[str, ...], Total], factors: Mapping[str, float]) -> dict[tuple[str, ...], Any]:
    """Return the mean losses by key, with the total of each group of them.

    Args:
        totals: The sums to which ``add_losses`` has added.
        factors: ``trainer.loss_weights``.
    """
    means = {key: total.mean for key, total in totals.items()}
    if factors:
        for of in dict.fromkeys(key[:-1] for key in totals):
            means[*of, "total"] = sum(means[*of, name] * factor for name, factor in factors.items())
    return means
