"""A model that takes for ever in the middle of a run, as long as a file says so: source for a user's project."""

PAUSES = """
import time
from pathlib import Path

from ksuit_runner.models.mlp import Mlp


class Pauses(Mlp):
    def __init__(self, input_shape, output_shape, pauses_at, hidden_dims=(), dropout=0.0):
        super().__init__(input_shape, output_shape, hidden_dims, dropout=dropout)
        self.pauses_at, self.count = pauses_at, 0

    def forward(self, x):
        self.count += 1
        if self.count == self.pauses_at and Path("armed").exists():
            print("paused", flush=True)
            time.sleep(3600)
        return super().forward(x)
"""
