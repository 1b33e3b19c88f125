"""Training of a model that ships, for a few steps."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@pytest.fixture
def train() -> Callable[..., list[float]]:
    """Return what takes a gradient step for each batch, and returns the losses before them."""

    def take_steps(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], lr: float) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        losses = []
        for inputs, targets in batches:
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return take_steps
