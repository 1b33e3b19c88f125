"""Code of a user's project, checked by mypy (``make lint``) and never run: the public API of ksuit_runner is typed."""

from pathlib import Path
from typing import Any, assert_type

from omegaconf import DictConfig
from torch import Tensor

from ksuit_runner import (
    DataContainer,
    ModelBase,
    PeriodicCallback,
    RunResult,
    SgdTrainer,
    UpdateCounter,
    compose,
    run,
)
from ksuit_runner.testing import TinyRun, tiny_run


class Mine(PeriodicCallback):
    logs = ("mine",)

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert_type(self.model, ModelBase)
        assert_type(self.trainer, SgdTrainer)
        assert_type(self.data_container, DataContainer)
        self.scale = scale

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self.writer.add_scalar("mine", self.scale * update_counter.update)


def train(folder: Path) -> float:
    config = compose(["model=mlp"])
    assert_type(config, DictConfig)
    result = run(config)
    assert_type(result, RunResult)
    assert_type(result.run_id, str)
    tiny = tiny_run(folder, {"mine": Mine})
    assert_type(tiny, TinyRun)
    assert_type(tiny.weights, dict[str, Tensor])
    return run(["resume=last"]).metrics["loss/test"].last
