"""A project with a model that pauses in the middle of an update, as long as a file exists."""

from pathlib import Path

MODEL = """
import time
from pathlib import Path

from ksuit_runner.models.mlp import Mlp


class Pauses(Mlp):
    def __init__(self, input_shape, output_shape, pauses_at, hidden_dims=(), dropout=0.0):
        super().__init__(input_shape, output_shape, hidden_dims, dropout=dropout)
        self.pauses_at, self.count = pauses_at, 0

    def forward(self, x):
        self.count += self.training  # evaluations do not count: where they come is not what such a test depends on
        if self.training and self.count == self.pauses_at and Path("armed").exists():
            print("paused", flush=True)
            while Path("armed").exists():
                time.sleep(0.01)
        return super().forward(x)
"""
CONFIG = "_target_: pauses.Pauses\npauses_at: 0\nhidden_dims: []\ndropout: 0.0\n"


def make_project(folder: Path) -> Path:
    """Create a project with ``model=pauses``, which pauses while the file ``armed`` exists."""
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "conf" / "model" / "pauses.yaml").write_text(CONFIG)
    (folder / "pauses.py").write_text(MODEL)
    return folder
