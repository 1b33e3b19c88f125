"""Fine-tuning: a network that knows the digits 0 to 4 learns 5 to 9 from a few samples of each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ksuit_runner.data.digits import Digits
from ksuit_runner.data.tensor_dataset import TensorDataset


class SomeDigits(TensorDataset):
    """The images of some digits, 8x8 pixels, with the class indices 0, 1, ... in the order of these digits.

    Args:
        split: "train" or "test".
        digits: Which digits.
        per_class: The first so many samples of each; None for all.
    """

    def __init__(self, split: str, digits: Sequence[int], per_class: int | None = None) -> None:
        whole = Digits(split)
        rows = [torch.nonzero(whole.targets == digit).flatten()[:per_class] for digit in digits]
        targets = torch.arange(len(digits)).repeat_interleave(torch.tensor([len(found) for found in rows]))
        super().__init__(whole.inputs[torch.cat(rows)], targets, output_shape=(len(digits),))


class Network(nn.Module):
    """Convolutional blocks with batch normalization, the mean over all positions, and a linear head.

    Args:
        input_shape: ``(channels, height, width)`` of an image; from the data.
        output_shape: ``(classes,)``; from the data.
        widths: Channels of each block.
    """

    def __init__(
        self, input_shape: Sequence[int], output_shape: Sequence[int], widths: Sequence[int] = (8, 16, 16)
    ) -> None:
        super().__init__()
        sizes = [input_shape[0], *widths]
        self.encoder = nn.Sequential(*(_block(*pair) for pair in zip(sizes, widths, strict=False)))
        self.head = nn.Linear(widths[-1], output_shape[0])

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, channels, height, width)`` to logits ``(batch, classes)``."""
        logits: Tensor = self.head(self.encoder(images).mean(dim=(2, 3)))
        return logits


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
