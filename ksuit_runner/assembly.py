"""Putting a run together: its objects from the config, and its state from a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint import CheckpointWriter
from ksuit_runner.checkpoint_format import Checkpoint
from ksuit_runner.data.container import DataContainer
from ksuit_runner.errors import CheckpointError, ConfigError, ResumeError
from ksuit_runner.factory import Factory, OnDemand
from ksuit_runner.hooks import Hooks
from ksuit_runner.interruption import Interruption
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.masking import mask_config
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.models.base import ModelBase
from ksuit_runner.origin import Origin
from ksuit_runner.random_keys import keyed
from ksuit_runner.run_record import RunRecord
from ksuit_runner.run_state import Run
from ksuit_runner.schedule import constant, follow_new_length
from ksuit_runner.trainer import SgdTrainer

EVALUATION_PREFIX = "eval/"
"""What the metrics of a stored run's evaluation begin with, in the record of that run."""


def build_trainer(factory: Factory, seed: int) -> SgdTrainer:
    """Build data, model and trainer; nothing is recorded yet, and no callback exists that could disturb them.

    Args:
        factory: Factory over the config of the run.
        seed: Seed of the run; every object is built under a key of its own.

    Raises:
        ConfigError: Something in the config does not fit.
    """
    with keyed(seed, "data"):
        data = factory.build("data", DataContainer, seed=seed)
    shapes = {name: OnDemand(partial(getattr, data, name)) for name in ("input_shape", "output_shape")}
    with keyed(seed, "model"):
        module = factory.build("model", nn.Module, **shapes)
    with keyed(seed, "trainer"):
        return factory.build(
            "trainer",
            SgdTrainer,
            model=module if isinstance(module, ModelBase) else ModelBase(module),
            data_container=data,
            optimizer=factory.delayed("optimizer", Optimizer),
            schedule=factory.delayed("schedule", None) if factory.has("schedule") else constant,
            loss=factory.build("loss", nn.Module),
            seed=seed,
        )


@dataclass(frozen=True)
class Assembly:
    """Puts a run together around a trainer and the record of the run.

    Attributes:
        factory: Factory over the config of the run.
        config: The config as plain values.
        trainer: Trainer with model and data.
        record: Record of the run.
        interruption: Signals that ask the run to end.
    """

    factory: Factory
    config: Mapping[str, Any]
    trainer: SgdTrainer
    record: RunRecord
    interruption: Interruption

    def run(self, checkpoint: Checkpoint | None, origin: Origin | None) -> Run:
        """Build writers and callbacks, and put everything where the checkpoint says.

        Args:
            checkpoint: What the run goes on from, or None to start from the beginning.
            origin: The stored run that the checkpoint belongs to.

        Raises:
            ConfigError: A callback does not fit its config.
            ResumeError: The checkpoint belongs to other callbacks.
        """
        properties = self._properties()
        log_writer = self._log_writer(properties, checkpoint.progress.update if checkpoint else -1)
        log_writer.prefix = EVALUATION_PREFIX if origin is not None and origin.mode == "evaluate" else ""
        checkpoint_writer = self._checkpoint_writer()
        collaborators = {
            "trainer": self.trainer,
            "model": self.trainer.model,
            "data_container": self.trainer.data_container,
            "tracker": self.record.tracker,
            "log_writer": log_writer,
            "checkpoint_writer": checkpoint_writer,
            "metric_property_provider": properties,
            "path_provider": self.record.paths,
            "update_counter": self.trainer.counter,
        }
        callbacks = self._callbacks(collaborators)
        run = Run(
            trainer=self.trainer,
            data=self.trainer.data_container,
            hooks=Hooks(callbacks, self.trainer.counter),
            log_writer=log_writer,
            checkpoint_writer=checkpoint_writer,
            interruption=self.interruption,
            seed=int(self.config["seed"]),
            taken_over=self.record.taken_over,
        )
        if checkpoint is not None and origin is not None:
            self._restore(run, checkpoint, origin)
        return run

    def _properties(self) -> MetricPropertyProvider:
        if self.factory.has("metric_property_provider"):
            return self.factory.build("metric_property_provider", MetricPropertyProvider)
        return MetricPropertyProvider()

    def _log_writer(self, properties: MetricPropertyProvider, update: int) -> LogWriter:
        is_logged = self.record.is_logged(update - 1)  # what follows the update itself may be half done
        counter, check_key = self.trainer.counter, self.record.tracker.check_key
        return LogWriter(self.record.journal, counter, properties, check_key, is_logged)

    def _checkpoint_writer(self) -> CheckpointWriter:
        text = json.dumps(mask_config(self.config), default=str)
        writer = self.factory.build("checkpoint", CheckpointWriter, path_provider=self.record.paths)
        writer.config_hash = sha256(text.encode()).hexdigest()[:16]
        writer.on_written = self.record.upload
        writer.check_owner = self.record.check_owner
        writer.is_urgent = lambda: self.interruption.signal is not None
        return writer

    def _callbacks(self, collaborators: dict[str, Any]) -> dict[str, CallbackBase]:
        scope = partial(keyed, int(self.config["seed"]), "callback")
        own = self.factory.build_all("callbacks", CallbackBase, scope, **collaborators)
        default = self.factory.build_all("default_callbacks", CallbackBase, scope, **collaborators)
        twice = sorted(own.keys() & default.keys())
        if twice:
            raise ConfigError(f"callbacks.{twice[0]}: default_callbacks has one of this name, give it another one")
        return {**own, **default}

    def _restore(self, run: Run, checkpoint: Checkpoint, origin: Origin) -> None:
        state = dict(checkpoint.state["trainer"])
        state["arrangements"] = arrangements = dict(state.get("arrangements", {}))
        if origin.has_other_model:  # its memory layout is its own
            arrangements.pop("model", None)
        if origin.has_other_loss:
            state.pop("loss", None)
        try:
            self.trainer.model.load(checkpoint.model, arrangements.get("model"))
        except RuntimeError as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise ResumeError(f"model: the checkpoint's weights do not fit. {reason}") from error
        try:
            self.trainer.load_state_dict(state, origin.has_same_optimizer)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(f"trainer: the checkpoint's state does not fit. {reason}") from error
        if origin.mode != "evaluate":
            run.log_writer.summarize(self.record.points_until(checkpoint.progress.update))
        may_differ = not self.config["resume_strict"]
        run.hooks.states.resume(checkpoint, self.trainer.model, may_differ, may_differ or origin.mode == "evaluate")
        if origin.mode == "resume":
            run.checkpoint_writer.take_up(str(checkpoint.progress), checkpoint.tags)
        run.unfinished = checkpoint.state["unfinished"]
        if origin.has_new_end or origin.changes_all(self.trainer.counter.stopped_by):
            self.trainer.counter.stopped = False
        if origin.has_new_end:
            follow_new_length(self.trainer.schedule)
