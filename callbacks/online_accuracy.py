"""Accuracy of training itself."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ksuit_runner.callback_bases.online import OnlineCallback
from ksuit_runner.config.types import PositiveInt
from ksuit_runner.trainer.hits import TopkAccuracy
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.sums import Sums


class OnlineAccuracy(OnlineCallback[Sums]):
    """Logs ``accuracy/train``, and ``accuracy_topK/train`` for K > 1, of the training batches since it was last logged.

    It uses the outputs that training computes anyway: in training mode, of augmented samples, and with the weights as
    they were at each update. With ``per_epoch`` it also logs ``accuracy/train/epoch``, that of each epoch; with
    ``heads`` the keys begin with ``accuracy_HEAD`` and ``accuracy_topK_HEAD``.

    Outputs and targets are as in the callback ``accuracy``. Targets may also be mixed, as probabilities of the outputs'
    shape: then the most probable class counts.

    Args:
        topk: Values of k: a prediction is right if the target is among the k classes with the highest scores.
        heads: Heads by name, see ``Head``: several outputs, or several subsets of the classes.
        ignore_index: Target that does not count, such as -100; None counts all.
        **kwargs: Passed on to OnlineCallback.

    Raises:
        ConfigError: A k is smaller than 1, or a head is wrong; or, at the first update, a k is larger than the number
            of classes, the targets are not class indices, or a head is not there.
    """

    logs: ClassVar[Sequence[str] | None] = (
        "accuracy{_heads}/train",
        "accuracy{_heads}/train/epoch",
        "accuracy_top{topk}{_heads}/train",
        "accuracy_top{topk}{_heads}/train/epoch",
    )

    def __init__(
        self,
        topk: Sequence[PositiveInt] = (1,),
        heads: Mapping[str, Mapping[str, Any]] | None = None,
        ignore_index: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._accuracy = TopkAccuracy(topk, heads, ignore_index, f"callbacks.{self.display_name}")
        self.topk, self.heads = topk, heads  # which `logs` names

    def _new_sums(self) -> Sums:
        return Sums()

    def _summed(self) -> str:
        return repr([self._accuracy.topk, self._accuracy.heads])

    def _accumulate(self, sums: Sums, batch: Any, losses: Losses, outputs: Any) -> None:
        _, targets = self.trainer.inputs_and_targets(batch)
        if _are_mixed(targets, outputs):
            targets = targets.argmax(-1)
        for name, hits, count in self._accuracy.hits(outputs, targets):
            sums.add(name, hits, count)

    def _log(self, sums: Sums, suffix: str) -> None:
        for name, hits in sums.totals.items():
            for metric, value in self._accuracy.accuracies(name, hits):
                self.writer.add_scalar(f"{metric}/train{suffix}", value)


def _are_mixed(targets: Any, outputs: Any) -> bool:
    """Whether targets are probabilities of classes, and not numbers of a regression with one output."""
    is_float = isinstance(targets, Tensor) and targets.is_floating_point() and targets.ndim > 1
    return is_float and targets.shape == getattr(outputs, "shape", None) and targets.shape[-1] > 1
