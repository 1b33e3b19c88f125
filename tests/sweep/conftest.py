"""A user's project with a model that fails on demand."""

import pytest

FRAGILE = """
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.linear import Linear


class Fragile(Linear):
    def __init__(self, input_shape, output_shape, fails_at=-1):
        super().__init__(input_shape, output_shape)
        self.fails_at, self.count = fails_at, 0
        if fails_at == 0:
            raise ConfigError("fails_at: it cannot even be built")

    def forward(self, x):
        self.count += 1
        if self.count == self.fails_at:
            raise RuntimeError("this one breaks")
        return super().forward(x)
"""


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    for group in ("sweep", "model", "experiment"):
        (folder / "conf" / group).mkdir(parents=True)
    (folder / "fragile.py").write_text(FRAGILE)
    (folder / "conf" / "model" / "fragile.yaml").write_text("_target_: fragile.Fragile\nfails_at: -1\n")
    (folder / "conf" / "sweep" / "fails.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: fragile\n"
        "objective: accuracy/validation\nsweep:\n  params:\n    model.fails_at: [5, 0, -1]\n"
    )
    return folder
