"""Perplexity and bits per character of a language model on a dataset."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.nn import functional as F

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.trainer.heads import Head


class Perplexity(DatasetCallback):
    """Logs ``perplexity/DATASET`` and ``bits_per_UNIT/DATASET``, for the live and all other weights.

    With H, the mean of -log p(target) over all targets of the dataset in nats, the perplexity is exp(H), that of
    a model that guesses among as many equally likely targets (F. Jelinek et al., "Perplexity: a measure of the
    difficulty of speech recognition tasks", 1977). Bits per character are H / log 2. Label smoothing does not count.

    Outputs are scores (logits or log-probabilities) of shape (batch, ..., classes) or (batch, classes, ...), targets
    are class indices of shape (batch, ...), such as tokens.

    Args:
        unit: What a target is, for the name of the second metric: character, byte, token.
        ignore_index: Target that does not count, such as that of padding.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: The targets are not class indices; raised before the first update.
    """

    shares_batch: ClassVar[bool] = True
    shares_work: ClassVar[bool] = True
    logs: ClassVar[Sequence[str] | None] = (
        "perplexity/{dataset_key}{/weights}",
        "bits_per_{unit}/{dataset_key}{/weights}",
    )

    def __init__(self, unit: str = "character", ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.unit = unit
        self.ignore_index = ignore_index
        self._head = Head(path=f"callbacks.{self.display_name}")

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        for weights, model in models.items():
            scores, classes, _ = self._head.scores(self.trainer.predict(inputs, model), targets)
            surprise = F.cross_entropy(
                scores.flatten(0, -2).float(), classes.flatten(), ignore_index=self.ignore_index, reduction="none"
            )
            self.gathered.add(weights, surprise.to(self.sum_dtype).sum(), count=(classes != self.ignore_index).sum())

    def _process_results(self, update_counter: UpdateCounter) -> None:
        for weights, surprise in self.gathered.totals.items():
            self.writer.add_scalar(self.metric_key("perplexity", weights), surprise.mean.exp())
            self.writer.add_scalar(self.metric_key(f"bits_per_{self.unit}", weights), surprise.mean / math.log(2))
