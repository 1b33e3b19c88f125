"""Cross-validation: a dataset is divided into folds, each of which is the validation set of one run."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Fold(Dataset[tuple[Tensor, Tensor]]):
    """Points on a noisy wave, without one fold of them, or that fold.

    Inputs are float32 of shape (1,), targets float32 of shape (1,).

    Args:
        part: ``rest``, all folds but one, to train on; or ``fold``, that one.
        number: Which fold it is, from 0. From ``folds`` on, the points are divided anew: numbers up to three times
            ``folds`` are a threefold repeated cross-validation.
        folds: Number of folds.
        length: Number of all points.
    """

    output_shape = (1,)

    def __init__(self, part: Literal["rest", "fold"], number: int, folds: int = 4, length: int = 120) -> None:
        inputs = torch.linspace(-1, 1, length).unsqueeze(1)
        noise = torch.randn(length, 1, generator=torch.Generator().manual_seed(0))
        targets = torch.sin(4 * inputs) + 0.1 * noise
        division, fold = divmod(number, folds)
        # The same division for all runs that belong together, whatever their own seeds are.
        order = torch.randperm(length, generator=torch.Generator().manual_seed(division))
        parts = order.chunk(folds)
        chosen = [parts[fold]] if part == "fold" else [other for i, other in enumerate(parts) if i != fold]
        rows = torch.cat(chosen).sort().values
        self.samples: Any = list(zip(inputs[rows], targets[rows], strict=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]
