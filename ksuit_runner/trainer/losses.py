"""The losses of a training step: means by name, what each is a mean over, and the total that is minimized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.errors import ConfigError, KsuitError, did_you_mean

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
            raise KsuitError(f"{self._step} returns a {type(result).__name__}; {_WANTED}", path="trainer")
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
        except KeyError:  # it returned others the first time
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
                found = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise KsuitError(f"{self._step} returns a {found} as '{name}'; {_WANTED}", path="trainer")
        for name, count in losses.counts.items():
            if not isinstance(count, (int, float)) and not (isinstance(count, Tensor) and count.numel() == 1):
                raise KsuitError(
                    f"{self._step} returns a {type(count).__name__} as the count of '{name}', which is a number or a "
                    "scalar tensor",
                    path="trainer",
                )
        if not self._factors:
            if "total" not in losses:
                names = ", ".join(f"{name}: 1" for name in losses)
                hint = f": sum up its losses for it, or set trainer.loss_weights={{{names}}}" if losses else ""
                raise KsuitError(f"{self._step} returns no 'total', which is what is minimized{hint}", path="trainer")
            return
        if "total" in losses:
            raise ConfigError(f"{self._step} returns a 'total' of its own", path="trainer.loss_weights")
        for name in self._factors:
            if name not in losses:
                raise ConfigError(
                    f"{self._step} returns no '{name}'. {did_you_mean(name, losses)}", path="trainer.loss_weights"
                )


class LossMeans:
    """The means of losses over several batches, or parts of them: each over everything that it counts.

    Sums and counts stay on the device: nothing waits for it.

    Args:
        is_sum: Whether the total is a sum over the samples, and not a mean.
        dtype: Type to sum up in.
    """

    def __init__(self, is_sum: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self._is_sum = is_sum
        self._dtype = dtype
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Count] = {}
        self._factors: Mapping[str, float] = {}

    def add(self, losses: Losses, weight: Count, size: Count) -> None:
        """Add the losses of a batch; over nothing the mean is NaN, and adds nothing.

        Args:
            losses: The losses, detached.
            weight: What the total, and the losses that it is the sum of, are means over where they do not say it.
            size: What other losses are means over where they do not say it: mostly the samples.
        """
        self._factors = factors = losses.factors
        counts, sums = losses.counts, self._sums
        for name, loss in losses.items():
            is_total = name == "total"
            if is_total and factors:
                continue  # it is the sum of the means of the others
            count = counts.get(name, weight if is_total or name in factors else size)
            self._counts[name] = self._counts[name] + count if name in sums else count
            if isinstance(count, Tensor):
                value = torch.where(count > 0, loss.to(self._dtype) * count, 0.0)
                sums[name] = sums[name] + value if name in sums else value
            elif name not in sums:
                factor = 1 if is_total and self._is_sum else count
                sums[name] = loss.to(self._dtype) * factor if count else torch.zeros_like(loss, dtype=self._dtype)
            elif count:
                sums[name].add_(loss, alpha=1 if is_total and self._is_sum else count)

    def means(self) -> dict[str, Tensor]:
        """Return the means by name, and start anew."""
        means = {name: value / self._counts[name] for name, value in self._sums.items()}
        if means and self._factors:
            means["total"] = torch.stack([means[name] * factor for name, factor in self._factors.items()]).sum()
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts."""
        return {"sums": dict(self._sums), "counts": dict(self._counts), "factors": dict(self._factors)}

    def load_state_dict(self, state_dict: Mapping[str, Any], device: torch.device) -> None:
        """Restore sums and counts."""
        self._sums = {name: value.to(device, copy=True) for name, value in state_dict["sums"].items()}
        self._counts = {
            name: count.to(device) if isinstance(count, Tensor) else count
            for name, count in state_dict["counts"].items()
        }
        self._factors = state_dict["factors"]
