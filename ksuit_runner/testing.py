"""Small real runs for the tests of a project's own callbacks, models and datasets, without config or command line."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import has_traces
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.config.factory import parameters_of
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.digits import Digits
from ksuit_runner.engine.assembly import build_run
from ksuit_runner.engine.loop import train
from ksuit_runner.engine.run import Run
from ksuit_runner.keyed_random import keyed
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.models.base import ModelBase
from ksuit_runner.models.linear import Linear
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.schedule import constant
from ksuit_runner.trainer.sgd import SgdTrainer

Callbacks = Mapping[str, Callable[..., CallbackBase]]


class TinyRun:
    """A run, and what a test can assert about it.

    Args:
        run: The run.
        paths: Its files.
        journal: Its metrics.
    """

    def __init__(self, run: Run, paths: PathProvider, journal: Journal) -> None:
        self.run = run
        self.paths = paths
        self.journal = journal

    def train(self) -> TinyRun:
        """Train to the end, or until the run is stopped, and return the run itself.

        Raises:
            BaseException: What training or a callback raised.
        """
        try:
            train(self.run)
        finally:
            self.run.checkpoint_writer.close()
            self.run.hooks.close()
            self.run.data.close()
        return self

    def __getitem__(self, name: str) -> Any:
        """Return the callback of that name."""
        return self.run.hooks.callbacks[name]

    @property
    def model(self) -> ModelBase:
        """The model."""
        return self.run.trainer.model

    @property
    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights, by name."""
        return {name: tensor.detach().clone() for name, tensor in self.model.module.state_dict().items()}

    def metric(self, key: str) -> dict[int, float]:
        """Return the values of a metric by update."""
        points = [point for line, _ in self.journal.read() for point in line]
        assert len({(point.key, point.step) for point in points}) == len(points)
        return {point.step: point.value for point in points if point.key == key}

    def metrics(self) -> set[str]:
        """Return the keys of all metrics."""
        return {point.key for line, _ in self.journal.read() for point in line}


def tiny_trainer(datasets: Mapping[str, Any], module: nn.Module, **kwargs: Any) -> SgdTrainer:
    """Make a trainer: by default plain SGD for 3 epochs on the CPU.

    Args:
        datasets: Datasets by key.
        module: The network.
        **kwargs: ``batch_size``, ``drop_last``, ``trainer_class``, and arguments of the trainer.
    """
    batch_size, drop_last = kwargs.pop("batch_size", 72), kwargs.pop("drop_last", False)
    data = DataContainer(datasets, batch_size, seed=7, eval_batch_size=100, drop_last=drop_last)
    if not {"max_epochs", "max_updates"} & kwargs.keys():
        kwargs["max_epochs"] = 3
    optimizer = kwargs.pop("optimizer", partial(SGD, lr=0.5))
    given = {"schedule": constant, "loss": nn.CrossEntropyLoss(), "device": "cpu", **kwargs}
    trainer_class = given.pop("trainer_class", SgdTrainer)
    built: SgdTrainer = trainer_class(model=ModelBase(module), data_container=data, optimizer=optimizer, **given)
    return built


def tiny_run(
    folder: Path,
    callbacks: Callbacks,
    run_id: str = "tiny",
    *,
    trainer: SgdTrainer | None = None,
    stop_at: int | None = None,
    strict: bool = True,
    checkpoint: Mapping[str, Any] | None = None,
    properties: MetricPropertyProvider | None = None,
    **kwargs: Any,
) -> TinyRun:
    """Build a run: by default softmax regression on handwritten digits, 20 updates per epoch, 3 epochs.

    Where the folder has a checkpoint of that run, the run resumes from it.

    Args:
        folder: Output folder, such as pytest's ``tmp_path``.
        callbacks: Name -> class, or ``partial(Class, argument=...)``.
        run_id: Its id.
        trainer: The trainer, instead of a default one; its data must have ``seed=7``.
        stop_at: Update after which it ends early, with a checkpoint, as by SIGTERM.
        strict: Whether a resume must have the callbacks whose states the checkpoint holds.
        checkpoint: Arguments of the checkpoint writer, such as ``every_n_updates``.
        properties: Knows which direction of a metric is better.
        **kwargs: ``datasets``, ``module``, and what ``tiny_trainer`` takes, such as ``max_updates``.
    """
    with keyed(7, "model"):
        module = kwargs.pop("module", None) or Linear((1, 8, 8), (10,))
    if trainer is None:
        datasets = kwargs.pop("datasets", None) or {"train": Digits("train"), "test": Digits("test")}
        trainer = tiny_trainer(datasets, module, **kwargs)
    paths = PathProvider(folder, run_id)
    if stop_at is not None:
        callbacks = {**callbacks, "interrupt": partial(InterruptAt, stop_at)}
    journal = Journal(paths.journal)
    Committer(paths).recover()
    run = build_run(
        trainer,
        paths,
        lambda collaborators: build_callbacks(callbacks, collaborators),
        seed=7,
        journal=journal,
        checkpoint_writer=CheckpointWriter(paths, **(checkpoint or {})),
        metric_property_provider=properties,
        checkpoint=read_newest(paths) if has_traces(paths) else None,
        strict=strict,
    )
    return TinyRun(run, paths, journal)


class InterruptAt(CallbackBase):
    """Asks the run to end after an update, as SIGTERM does.

    Args:
        update: The update.
        **kwargs: Passed on to CallbackBase.
    """

    def __init__(self, update: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.update = update

    def _after_update(self, update_counter: UpdateCounter) -> None:
        if update_counter.update == self.update:
            self.data_container.interruption.signal = signal.SIGTERM


def build_callbacks(callbacks: Callbacks, collaborators: Mapping[str, Any], seed: int = 7) -> dict[str, CallbackBase]:
    """Build callbacks, each with the collaborators that its constructor asks for, as from a config.

    Args:
        callbacks: Name -> class, or ``partial(Class, argument=...)``.
        collaborators: The collaborators by name.
        seed: Seed of the run.
    """
    built = {}
    for name, make in callbacks.items():
        target: Any = make
        while isinstance(target, partial):
            target = target.func
        asked = {parameter.name for parameter in parameters_of(target)}
        with keyed(seed, "callback", name):
            built[name] = make(**{key: value for key, value in {**collaborators, "name": name}.items() if key in asked})
    return built
