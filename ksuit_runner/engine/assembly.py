"""The assembly of a run: its objects, built from the config and wired."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from threading import Event
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.base_weights import BaseWeights
from ksuit_runner.checkpoint.commit import Committer, InPlace
from ksuit_runner.checkpoint.format import Checkpoint
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.config.factory import Factory, OnDemand
from ksuit_runner.data.container import DataContainer
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.hooks import Hooks
from ksuit_runner.engine.log_agreement import LogAgreement
from ksuit_runner.engine.meeting import Meeting
from ksuit_runner.engine.phases import Phases
from ksuit_runner.engine.restore import restore
from ksuit_runner.engine.run import Run
from ksuit_runner.engine.silent_record import SilentRecord
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import keyed
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal, SilentJournal
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.schedule import Schedule, constant
from ksuit_runner.security.masking import mask_config
from ksuit_runner.system.signals import Interruption
from ksuit_runner.tracker.base import BaseTracker
from ksuit_runner.tracker.noop import NoopTracker
from ksuit_runner.trainer.freezing import frozen_for_good
from ksuit_runner.trainer.gradients import versions
from ksuit_runner.trainer.optimizer_specs import OptimizerSpec
from ksuit_runner.trainer.sgd import SgdTrainer

_LOGGER = logging.getLogger(__name__)
EVALUATION_PREFIX = "eval/"
"""Prefix of the metrics of ``evaluate=``, in the record of the evaluated run."""


def build_strategy(factory: Factory, world: World | None = None) -> Strategy:
    """Build what says how the ranks of a run share its training; by default there is one rank.

    Raises:
        ConfigError: It does not fit its config.
    """
    return factory.build_or_default("strategy", Strategy, world=world or World())


def build_trainer(
    factory: Factory,
    seed: int,
    interruption: Interruption,
    strategy: Strategy | None = None,
    shapes: Mapping[str, Any] | None = None,
) -> SgdTrainer:
    """Build data, model and trainer; nothing is recorded yet, and no callback exists that could disturb them.

    Args:
        factory: Factory over the config of the run.
        seed: Seed of the run; every object is built under a key of its own.
        interruption: Signals that ask the run to end.
        strategy: How the ranks of the run share its training; by default what the config says, for a single one.
        shapes: ``input_shape`` and ``output_shape`` of the model; those that are not given are those of the data.

    Raises:
        ConfigError: An object does not fit its config.
    """
    strategy = strategy or build_strategy(factory)
    with keyed(seed, "data"):
        data = factory.build("data", DataContainer, seed=seed, interruption=interruption, world=strategy.world)
    if data.interruption is not interruption:
        raise ConfigError(f"{type(data).__name__} has to take **kwargs, and pass them on", path="data._target_")
    known = shapes or {}
    model = build_model(factory, seed, lambda name: known[name] if name in known else getattr(data, name))
    with keyed(seed, "trainer"):
        return factory.build(
            "trainer",
            SgdTrainer,
            model=model,
            data_container=data,
            optimizer=optimizers_of(factory),
            schedule=_schedule(factory, "schedule", constant),
            weight_decay_schedule=_schedule(factory, "weight_decay_schedule", None),
            loss=factory.build("loss", nn.Module),
            seed=seed,
            strategy=strategy,
        )


def build_model(factory: Factory, seed: int, shape: Callable[[str], Any]) -> ModelBase:
    """Build the model, under a key of its own.

    Args:
        factory: Factory over the config of the run.
        seed: Seed of the run.
        shape: Returns ``input_shape`` or ``output_shape``, for a model that asks for it.

    Raises:
        ConfigError: It does not fit its config.
    """
    with keyed(seed, "model"):
        module = factory.build(
            "model", nn.Module, **{name: OnDemand(partial(shape, name)) for name in ("input_shape", "output_shape")}
        )
    return module if isinstance(module, ModelBase) else ModelBase(module)


def optimizers_of(factory: Factory) -> Callable[..., Optimizer] | dict[str, OptimizerSpec]:
    """Return what builds the optimizer, or each of several by name."""
    paths = factory.objects_beside("optimizer")
    if not paths:
        return factory.delayed("optimizer", Optimizer)
    return {
        path.rpartition(".")[2]: OptimizerSpec(
            factory.delayed(path, Optimizer),
            **factory.settings(path),
            schedule=_schedule(factory, f"{path}.schedule", None),
            weight_decay_schedule=_schedule(factory, f"{path}.weight_decay_schedule", None),
        )
        for path in paths
    }


def _schedule(factory: Factory, path: str, default: Callable[..., Schedule] | None) -> Any:
    return factory.delayed(path, None) if factory.has(path) else default


@dataclass(frozen=True)
class Assembly:
    """Assembles a run around its trainer and its record.

    Attributes:
        factory: Factory over the config of the run.
        config: The config as plain values.
        trainer: Trainer with model and data.
        record: Record of the run.
        meeting: Has the ranks of the run come together; by default there is one.
    """

    factory: Factory
    config: Mapping[str, Any]
    trainer: SgdTrainer
    record: SilentRecord
    meeting: Meeting = field(default_factory=lambda: Meeting(World()))

    def run(self, checkpoint: Checkpoint | None, origin: Origin | None) -> Run:
        """Build writers and callbacks, and restore the checkpoint; see ``build_run``."""
        return build_run(
            self.trainer,
            self.record.paths,
            self._callbacks,
            seed=int(self.config["seed"]),
            tracker=self.record.tracker,
            journal=self.record.journal,
            checkpoint_writer=self._checkpoint_writer(),
            metric_property_provider=self.factory.build_or_default("metric_property_provider", MetricPropertyProvider),
            taken_over=self.record.taken_over,
            checkpoint=checkpoint,
            origin=origin,
            strict=self.config["resume_strict"],
            meeting=self.meeting,
        )

    def _checkpoint_writer(self) -> CheckpointWriter:
        text = json.dumps(mask_config(self.config), default=str)
        given = {
            "path_provider": self.record.paths,
            "config_hash": sha256(text.encode()).hexdigest()[:16],
            "check_owner": self.record.check_owner,
            "is_urgent": lambda: self.trainer.data_container.interruption.signal is not None,
            "hand_over": self.record.checkpoints,
            "world": self.trainer.strategy.world,
        }
        writer = self.factory.build("checkpoint", CheckpointWriter, **given)
        if writer.check_owner is not given["check_owner"]:
            raise ConfigError(
                f"{type(writer).__name__} has to take **kwargs, and pass them on", path="checkpoint._target_"
            )
        return writer

    def _callbacks(self, collaborators: dict[str, Any]) -> dict[str, CallbackBase]:
        scope = partial(keyed, int(self.config["seed"]), "callback")
        own = self.factory.build_all("callbacks", CallbackBase, scope, **collaborators)
        default = self.factory.build_all("default_callbacks", CallbackBase, scope, **collaborators)
        twice = sorted(own.keys() & default.keys())
        if twice:
            raise ConfigError("default_callbacks has the same name; rename one of them", path=f"callbacks.{twice[0]}")
        return {**own, **default}


def build_run(
    trainer: SgdTrainer,
    paths: PathProvider,
    build_callbacks: Callable[[dict[str, Any]], Mapping[str, CallbackBase]],
    *,
    seed: int = 0,
    tracker: BaseTracker | None = None,
    journal: Journal | None = None,
    checkpoint_writer: CheckpointWriter | None = None,
    metric_property_provider: MetricPropertyProvider | None = None,
    taken_over: Event | None = None,
    checkpoint: Checkpoint | None = None,
    origin: Origin | None = None,
    strict: bool = True,
    meeting: Meeting | None = None,
) -> Run:
    """Wire a run: its writers, its callbacks with their collaborators, and the state of the checkpoint.

    Args:
        trainer: Trainer with model and data.
        paths: Paths of the run.
        build_callbacks: Builds the callbacks, by name, from their collaborators by name.
        seed: Seed of the run.
        tracker: Tracker of the run; by default none.
        journal: Its journal; by default that of its folder.
        checkpoint_writer: Writes its checkpoints; by default one at its end.
        metric_property_provider: Knows which direction of a metric is better.
        taken_over: Set when another process has taken the run over.
        checkpoint: Checkpoint to resume from, or None to start from the beginning.
        origin: The stored run that the checkpoint belongs to; by default this one.
        strict: Whether it must have the callbacks whose states the checkpoint holds.
        meeting: Has the ranks of the run come together; by default one of its own.

    Raises:
        ConfigError: A callback does not fit its config.
        ResumeError: The checkpoint belongs to other callbacks, or another model.
    """
    world, tracker = trainer.strategy.world, tracker or NoopTracker()
    journal = journal or (Journal(paths.journal) if world.records else SilentJournal(paths.journal))
    if checkpoint_writer is None:
        hand_over = InPlace(Committer(paths, sync_journal=journal.sync))
        checkpoint_writer = CheckpointWriter(paths, hand_over=hand_over, world=world)
    properties = metric_property_provider or MetricPropertyProvider()
    origin = origin or Origin(Mode.RESUME, paths.run_id)
    update = checkpoint.progress.update if checkpoint else -1
    known = journal.load_after(update - 1)  # the hooks of the update itself may be half done
    for schedule in trainer.optimizers.metric_schedules():
        schedule.check_direction(properties.direction(str(schedule.metric)))
    log_writer = LogWriter(
        journal,
        trainer.counter,
        properties,
        tracker.check_key,
        lambda key, step: key in known.get(step, ()),
        paths.artifacts_dir,
        EVALUATION_PREFIX if origin.mode == Mode.EVALUATE else "",
        agree=LogAgreement(world, trainer.counter, checkpoint_writer) if world.size > 1 else None,
        takes_files=world.records,
    )
    trainer.writer.attach(log_writer)
    checkpoint_writer.check_interval(trainer.counter)
    # As they are at the beginning, before a callback or a checkpoint changes them.
    base_weights = _never_trained(trainer) if checkpoint_writer.content == "trained" else None
    phases = Phases()
    siblings: dict[str, CallbackBase] = {}
    collaborators = {
        "trainer": trainer,
        "model": trainer.model,
        "data_container": trainer.data_container,
        "tracker": tracker,
        "log_writer": log_writer,
        "checkpoint_writer": checkpoint_writer,
        "metric_property_provider": properties,
        "path_provider": paths,
        "update_counter": trainer.counter,
        "phases": phases,
        "siblings": siblings,
    }
    callbacks = build_callbacks(collaborators)
    siblings.update(callbacks)
    phases.attach(trainer, log_writer, checkpoint_writer, callbacks)
    gradient_versions = partial(versions, trainer.optimizers.parameters)
    hooks = Hooks(callbacks, trainer.counter, seed, gradient_versions, world)
    trainer.callback_states = hooks.states.state_dict  # the callbacks, which are built around the trainer, come later
    run = Run(
        trainer=trainer,
        hooks=hooks,
        log_writer=log_writer,
        checkpoint_writer=checkpoint_writer,
        seed=seed,
        meeting=meeting or Meeting(world),
        tracker=tracker,
        taken_over=taken_over or Event(),
        base_weights=base_weights,
    )
    if checkpoint is not None:
        if origin.mode != Mode.EVALUATE:
            log_writer.summarize(point for line, _ in journal.read() for point in line if point.step <= update)
        restore(run, checkpoint, origin, strict)
    return run


def _never_trained(trainer: SgdTrainer) -> BaseWeights:
    """Return the weights that are frozen for the whole run, which checkpoints then leave out."""
    stored, frozen = trainer.model.tensors(), frozen_for_good(trainer.model.module, trainer.freezing)
    held = {name: value for name, value in frozen.items() if name in stored}
    return BaseWeights(held, trainer.strategy.world)
