"""Code of a user's project, checked by mypy (``make lint``) and never run: the public API of ksuit_runner is typed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_type

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ksuit_runner import (
    BaseTracker,
    CallbackBase,
    ConfigError,
    DataContainer,
    DatasetCallback,
    FeatureCallback,
    Interval,
    Launcher,
    MetricCallback,
    ModelBase,
    OnlineCallback,
    PathProvider,
    PeriodicCallback,
    RunResult,
    SgdTrainer,
    StopTraining,
    TensorDataset,
    UpdateCounter,
    compose,
    load_model,
    metrics,
    run,
    runs,
)
from ksuit_runner.launchers.base import Handle
from ksuit_runner.testing import TinyRun, tiny_run
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.sums import Sums


class Mine(PeriodicCallback):
    logs = ("mine",)

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert_type(self.model, ModelBase)
        assert_type(self.trainer, SgdTrainer)
        assert_type(self.data_container, DataContainer)
        assert_type(self.tracker, BaseTracker)
        assert_type(self.interval, Interval)
        self.scale = scale

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self.writer.add_scalar("mine", self.scale * update_counter.update)


class SizeOfOutputs(OnlineCallback[Sums]):
    def _new_sums(self) -> Sums:
        return Sums()

    def _accumulate(self, sums: Sums, batch: Any, losses: Losses, outputs: Any) -> None:
        sums.add("size", outputs.square().sum(), count=len(outputs))

    def _log(self, sums: Sums, suffix: str) -> None:
        self.writer.add_scalar(f"size/train{suffix}", sums.totals["size"].mean)


class SizeOfFeatures(FeatureCallback):
    def _process_results(self, update_counter: UpdateCounter) -> None:
        for found in self.features():
            assert_type(found.values, Tensor)
            self.writer.add_scalar(self.layer_key("size", found), found.values.square().mean())


class Watcher(CallbackBase):
    def _before_training(self, update_counter: UpdateCounter) -> None:
        raise ConfigError("is not what it should be", path="callbacks.watcher")


class Largest(DatasetCallback):
    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        assert_type(self.metric_key("largest", "ema"), str)


class Patience(MetricCallback):
    def _process_value(self, value: float) -> None:
        if value > 3:
            raise StopTraining("it diverges")


class Two(SgdTrainer):
    def training_step(self, batch: Any, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
        losses, outputs = super().training_step(batch, model)
        return losses, outputs


class Elsewhere(Launcher):
    def submit(self, function: Callable[[Any], Any], task: Any) -> Handle:
        raise NotImplementedError


def points() -> TensorDataset:
    return TensorDataset(torch.zeros(3, 2), torch.zeros(3), output_shape=(1,))


def end(tracker: BaseTracker, paths: PathProvider) -> Path:
    tracker.end_run(EndStatus.FINISHED)
    return paths.run_dir


def train(folder: Path) -> float:
    config = compose(["model=mlp"])
    assert_type(config, DictConfig)
    result = run(config)
    assert_type(result, RunResult)
    assert_type(result.run_id, str)
    assert_type(load_model("last@best", weights="ema", device="cpu"), nn.Module)
    metrics(result.run_id, folder)
    runs(folder)
    tiny = tiny_run(folder, {"mine": Mine})
    assert_type(tiny, TinyRun)
    assert_type(tiny.weights, dict[str, Tensor])
    return run(["resume=last"]).metrics["loss/test"].last
