"""The work of the small benchmark, for everyone who does it: digits, a perceptron 64-128-10, batches of 32."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ksuit_runner.data.digits import Digits

BATCH_SIZE = 32
TEST_BATCH_SIZE = 512
LEARNING_RATE = 3e-3
LOG_EVERY = 50
DECAY = 0.99


@dataclass(frozen=True)
class SmallTask:
    """The data, and how long it is trained on.

    Attributes:
        uri: Tracking URI of an SQLite store that exists.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    uri: str
    folder: Path

    @classmethod
    def make(cls, epochs: int, folder: Path) -> "SmallTask":
        train, test = ((split.inputs.flatten(1), split.targets) for split in (Digits("train"), Digits("test")))
        return cls(train, test, epochs, f"sqlite:///{folder / 'peers.db'}", folder)

    @property
    def updates(self) -> int:
        return self.epochs * (len(self.train[0]) // BATCH_SIZE)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def optimizer(self, model: nn.Module, fused: bool | None = None) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=fused)

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        train = DataLoader(TensorDataset(*self.train), BATCH_SIZE, shuffle=True, drop_last=True)
        return train, DataLoader(TensorDataset(*self.test), TEST_BATCH_SIZE)
