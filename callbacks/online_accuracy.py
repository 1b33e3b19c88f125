"""Accuracy of training itself."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.online_callback import OnlineCallback
from ksuit_runner.trainer.hits import checked_topk, count_hits
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.sums import Sums


class OnlineAccuracy(OnlineCallback[Sums]):
    """Logs ``accuracy/train``, and ``accuracy_topK/train`` for K > 1, of the training batches since it was last logged.

    It is that of the outputs that training computes anyway: in training mode, with augmented samples, and with the
    weights as they were at each update. With ``per_epoch`` that of each epoch is ``accuracy/train/epoch``.

    The outputs of ``training_step`` are scores of shape (samples, ..., classes), the targets class indices of shape
    (samples, ...); of targets that are mixed, with probabilities of the outputs' shape, the most probable class counts.

    Args:
        topk: Values of k: a prediction is right if the target is among the k classes with the highest scores.
        **kwargs: Passed on to OnlineCallback.

    Raises:
        ConfigError: A k is smaller than 1; or, at the first update, larger than the number of classes, or outputs or
            targets are something else.
    """

    logs: ClassVar[Sequence[str] | None] = (
        "accuracy/train",
        "accuracy/train/epoch",
        "accuracy_top{topk}/train",
        "accuracy_top{topk}/train/epoch",
    )

    def __init__(self, topk: Sequence[int] = (1,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.topk = checked_topk(topk)

    def _new_sums(self) -> Sums:
        return Sums()

    def _accumulate(self, sums: Sums, batch: Any, losses: Losses, outputs: Any) -> None:
        _, targets = self.trainer.inputs_and_targets(batch)
        if targets.is_floating_point() and targets.shape == outputs.shape:
            targets = targets.argmax(-1)
        hits = count_hits(outputs, targets, self.topk[-1], f"callbacks.{self.display_name}")
        sums.add("hits", hits, targets.numel())

    def _log(self, sums: Sums, suffix: str) -> None:
        for hits in sums.totals.values():
            for k in self.topk:
                metric = "accuracy" if k == 1 else f"accuracy_top{k}"
                self.writer.add_scalar(f"{metric}/train{suffix}", hits.sum[:k].sum() / hits.count)
