"""The assembly of a run."""

import pytest

from ksuit_runner.config.factory import Factory
from ksuit_runner.data.container import DataContainer
from ksuit_runner.engine.assembly import build_trainer
from ksuit_runner.errors import ConfigError
from ksuit_runner.system.signals import Interruption


class Deaf(DataContainer):
    def __init__(self, batch_size: int, seed: int):
        super().__init__({"train": range(9)}, batch_size, seed)


def test_data_that_no_signal_would_reach_is_refused():
    config = {"data": {"_target_": f"{__name__}.Deaf", "batch_size": 3}}
    with pytest.raises(ConfigError, match=r"^data\._target_: Deaf has to take \*\*kwargs, and pass them on$"):
        build_trainer(Factory(config), 0, Interruption())
