"""DistilBERT on sentences of different lengths: batches are padded to their longest sentence, and are mappings."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import BatchEncoding

from ksuit_runner import SgdTrainer

PADDING, CLASSIFY = 0, 1
LIKED, DISLIKED, NEUTRAL = range(2, 8), range(8, 14), range(14, 100)


class Reviews(Dataset[dict[str, Any]]):
    """Made-up reviews of 4 to 24 words: three words of praise, or three of blame, among words that say nothing.

    A sample is a mapping: ``input_ids``, int64 of shape (words,), and its ``labels``, 0 or 1.

    Args:
        size: Number of reviews.
        seed: Seed of the generator that writes them.
    """

    output_shape = (2,)

    def __init__(self, size: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.targets = generator.integers(0, 2, size)
        self.texts = []
        for label in self.targets:
            words = generator.choice(NEUTRAL, generator.integers(0, 21))
            opinion = generator.choice(LIKED if label else DISLIKED, 3)
            self.texts.append(torch.tensor([CLASSIFY, *generator.permutation([*words, *opinion])]))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.texts[index], "labels": int(self.targets[index])}


def pad(samples: list[dict[str, Any]]) -> BatchEncoding:
    """Pad the sentences of a batch to the longest of them.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape (batch, longest), ``labels`` of shape (batch,).
    """
    texts = [sample["input_ids"] for sample in samples]
    input_ids = pad_sequence(texts, batch_first=True, padding_value=PADDING)
    labels = torch.tensor([sample["labels"] for sample in samples])
    return BatchEncoding({"input_ids": input_ids, "attention_mask": input_ids != PADDING, "labels": labels})


class Classifier(nn.Module):
    """Gives a network of Hugging Face what it takes, by name, and returns its scores.

    Args:
        network: A model for the classification of sequences.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return scores of shape (batch, classes)."""
        logits: Tensor = self.network(**inputs).logits
        return logits


class TextTrainer(SgdTrainer):
    """Says what of a batch is inputs and what targets: all that losses, accuracy and accumulation need to know."""

    def inputs_and_targets(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Return what the network takes, by name, and the labels."""
        return {key: batch[key] for key in ("input_ids", "attention_mask")}, batch["labels"]
