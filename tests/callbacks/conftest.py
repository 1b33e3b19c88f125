"""Small real runs with a few callbacks, without the command line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ksuit_runner.data.digits import Digits
from ksuit_runner.testing import TinyRun, tiny_run


@pytest.fixture(scope="session")
def digits() -> dict[str, Digits]:
    return {"train": Digits("train"), "test": Digits("test")}


@pytest.fixture
def new_run(tmp_path: Path, digits: dict[str, Digits]) -> Iterator[Callable[..., TinyRun]]:
    """Makes runs of softmax regression on the digits: 20 updates per epoch, 3 epochs."""
    torch.use_deterministic_algorithms(True)
    yield lambda callbacks, run_id="tiny", datasets=digits, **kwargs: tiny_run(
        tmp_path, callbacks, run_id, datasets=datasets, **kwargs
    )
    torch.use_deterministic_algorithms(False)
