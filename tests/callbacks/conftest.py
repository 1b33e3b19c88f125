"""A whole run around a few callbacks, without the command line: real data, trainer, journal and checkpoints."""

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint import CheckpointWriter
from ksuit_runner.checkpoint_format import read_newest
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.digits import Digits
from ksuit_runner.hooks import Hooks
from ksuit_runner.interruption import Interruption
from ksuit_runner.journal import Journal
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.loop import train
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.models.base import ModelBase
from ksuit_runner.models.linear import Linear
from ksuit_runner.paths import PathProvider
from ksuit_runner.run_state import Run
from ksuit_runner.schedule import constant
from ksuit_runner.tracker.noop import NoopTracker
from ksuit_runner.trainer import SgdTrainer

Callbacks = Mapping[str, Callable[..., CallbackBase]]


class InterruptAt(CallbackBase):
    """Asks the run to end after an update, as SIGTERM does."""

    def __init__(self, update: int, interruption: Interruption, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.update = update
        self.interruption = interruption

    def _after_update(self, update_counter: UpdateCounter) -> None:
        if update_counter.update == self.update:
            self.interruption.signal = signal.SIGTERM


@dataclass
class TinyRun:
    """A run and what is looked at afterwards."""

    run: Run
    journal: Journal
    paths: PathProvider

    def train(self) -> "TinyRun":
        try:
            train(self.run)
        finally:
            self.run.checkpoint_writer.close()
            self.run.hooks.close()
        return self

    def __getitem__(self, name: str) -> Any:
        """Return the callback of that name."""
        return self.run.hooks.callbacks[name]

    @property
    def model(self) -> ModelBase:
        return self.run.trainer.model

    def metric(self, key: str) -> dict[int, float]:
        """Return the values of a metric by update."""
        points = [point for line, _ in self.journal.read() for point in line]
        assert len({(point.key, point.step) for point in points}) == len(points)
        return {point.step: point.value for point in points if point.key == key}

    def metrics(self) -> set[str]:
        return {point.key for line, _ in self.journal.read() for point in line}


def tiny_trainer(datasets: Mapping[str, Any], module: torch.nn.Module, **kwargs: Any) -> SgdTrainer:
    """Return a trainer for 60 updates of 3 epochs, unless told otherwise."""
    batch_size, drop_last = kwargs.pop("batch_size", 72), kwargs.pop("drop_last", False)
    data = DataContainer(datasets, batch_size, seed=7, eval_batch_size=100, drop_last=drop_last)
    if not {"max_epochs", "max_updates"} & kwargs.keys():
        kwargs["max_epochs"] = 3
    optimizer = kwargs.pop("optimizer", partial(torch.optim.SGD, lr=0.5))
    given = {"schedule": constant, "loss": torch.nn.CrossEntropyLoss(), "device": "cpu", **kwargs}
    trainer_class = given.pop("trainer_class", SgdTrainer)
    return trainer_class(model=ModelBase(module), data_container=data, optimizer=optimizer, **given)


@dataclass
class Maker:
    """Puts runs together and, where there is a checkpoint of that id, goes on from it."""

    folder: Path
    datasets: Mapping[str, Any]

    def __call__(
        self,
        callbacks: Callbacks,
        run_id: str = "tiny",
        module: torch.nn.Module | None = None,
        stop_at: int | None = None,
        strict: bool = True,
        checkpoint: Mapping[str, int] | None = None,
        properties: MetricPropertyProvider | None = None,
        **kwargs: Any,
    ) -> TinyRun:
        torch.manual_seed(3)
        trainer = tiny_trainer(kwargs.pop("datasets", self.datasets), module or Linear((1, 8, 8), (10,)), **kwargs)
        paths = PathProvider(self.folder, run_id)
        journal = Journal(paths.journal)
        properties = properties or MetricPropertyProvider()
        recorded = journal.load_after(-1)
        writer = LogWriter(
            journal, trainer.counter, properties, lambda key: None, lambda key, step: key in recorded.get(step, ())
        )
        interruption = Interruption()
        collaborators = {
            "trainer": trainer,
            "model": trainer.model,
            "data_container": trainer.data_container,
            "tracker": NoopTracker(),
            "log_writer": writer,
            "checkpoint_writer": CheckpointWriter(paths, **(checkpoint or {})),
            "metric_property_provider": properties,
        }
        if stop_at is not None:
            callbacks = {**callbacks, "interrupt": partial(InterruptAt, stop_at, interruption)}
        built = {name: make(**collaborators, name=name) for name, make in callbacks.items()}
        hooks = Hooks(built, trainer.counter)
        run = Run(
            trainer=trainer,
            data=trainer.data_container,
            hooks=hooks,
            log_writer=writer,
            checkpoint_writer=collaborators["checkpoint_writer"],
            interruption=interruption,
            seed=7,
        )
        tiny = TinyRun(run, journal, paths)
        if paths.latest.exists():
            restore(tiny, strict)
        return tiny


def restore(tiny: TinyRun, strict: bool) -> None:
    checkpoint = read_newest(tiny.paths)
    tiny.model.load(checkpoint.model, checkpoint.state["trainer"]["arrangements"]["model"])
    tiny.run.trainer.load_state_dict(checkpoint.state["trainer"])
    tiny.run.hooks.states.resume(checkpoint, tiny.model, not strict, not strict)


@pytest.fixture(scope="session")
def digits() -> dict[str, Digits]:
    return {"train": Digits("train"), "test": Digits("test")}


@pytest.fixture
def new_run(tmp_path: Path, digits: dict[str, Digits]) -> Iterator[Maker]:
    """Makes runs of softmax regression on the digits: 20 updates per epoch, 3 epochs."""
    torch.use_deterministic_algorithms(True)
    yield Maker(tmp_path, digits)
    torch.use_deterministic_algorithms(False)
