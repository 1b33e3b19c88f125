"""The weight of a batch's loss, or of that of a part of it, in a mean over several."""

import logging
from typing import Any

from torch import Tensor, nn

_LOGGER = logging.getLogger(__name__)
_UNEVEN = (nn.CrossEntropyLoss, nn.NLLLoss)
_NO_TARGET = nn.CrossEntropyLoss().ignore_index


class LossWeights:
    """Weighs the loss of a batch: by its samples, or by what the loss is a mean over.

    The losses of torch that ignore targets or weigh classes are known. Any other loss can have a method
    ``count(targets)``, which returns the number that its mean divides by.

    Args:
        loss: The loss module.

    Attributes:
        are_sums: Whether losses are sums over the samples, and not means.
        are_uneven: Whether the loss was made to ignore targets, to weigh classes or to count for itself.
    """

    def __init__(self, loss: nn.Module) -> None:
        self.are_sums = getattr(loss, "reduction", None) == "sum"
        self._loss = loss
        self._count = getattr(loss, "count", None)
        self._is_known = any(type(loss).forward is kind.forward for kind in _UNEVEN)
        parts = [module for module in loss.modules() if isinstance(getattr(module, "ignore_index", None), int)]
        self._ignored = {int(module.ignore_index) for module in parts}  # type: ignore[arg-type]
        self._weighs_classes = any(getattr(module, "weight", None) is not None for module in parts)
        self.are_uneven = callable(self._count) or self._weighs_classes or not self._ignored <= {_NO_TARGET}
        self._has_warned = False

    def of(self, targets: Any, samples: int) -> float | Tensor:
        """Return the weight of the loss on some targets.

        Args:
            targets: The targets of the loss; None if they are not known.
            samples: Number of samples.

        Returns:
            The number of samples, or what the loss counts, a scalar.
        """
        if self.are_sums:
            return samples
        if callable(self._count) and targets is not None:
            return self._count(targets)  # type: ignore[no-any-return]
        if not self._ignored:
            return samples
        if not isinstance(targets, Tensor) or not self._is_known:
            self._warn_if_uneven(targets)
            return samples
        if targets.is_floating_point():  # probabilities: none is ignored, and the mean is one over the samples
            return samples
        counted = targets.ne(self._loss.ignore_index)  # type: ignore[arg-type]
        weight: Tensor | None = self._loss.weight  # type: ignore[assignment]
        return counted.sum() if weight is None else weight[targets[counted].long()].sum()

    def _warn_if_uneven(self, targets: Any) -> None:
        if self._has_warned:
            return
        is_uneven = self._weighs_classes or self._ignored != {_NO_TARGET}
        if isinstance(targets, Tensor):
            is_uneven = self._weighs_classes or any(bool((targets == index).any()) for index in self._ignored)
        if is_uneven:
            self._has_warned = True
            _LOGGER.warning(
                "loss: %s ignores targets or weighs classes, and batches count by their samples: the mean over several "
                "depends on how they are cut (accumulation_steps, eval_batch_size). Give the loss a method "
                "count(targets), or override `weight` of the trainer",
                type(self._loss).__name__,
            )
