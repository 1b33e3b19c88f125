"""The base class of callbacks: their collaborators, and the hooks that the loop calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import getattr_static
from math import inf
from typing import Any, ClassVar, TypeVar, cast

import torch

from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.config.overridden import check_overridden
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.container import DataContainer
from ksuit_runner.errors import Interrupted, StopTraining
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.tracker.base import BaseTracker
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.sgd import SgdTrainer

Template = TypeVar("Template", bound=Callable[..., None])


def template(hook: Template) -> Template:
    """Make a hook's public method: without gradients, with its metrics under the callback's name."""

    @wraps(hook)
    def call(self: CallbackBase, *args: Any, **kwargs: Any) -> None:
        self.writer.source = self.name or type(self).__name__
        try:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    hook(self, *args, **kwargs)
            else:
                hook(self, *args, **kwargs)
        except (StopTraining, Interrupted):
            raise
        except BaseException as error:
            error.add_note(f"raised in callback '{self.display_name}', hook {hook.__name__}")
            raise

    call.template = call  # type: ignore[attr-defined]
    return cast(Template, call)


def is_template(hook: Any) -> bool:
    """Whether a method was made by ``template``, and does not only wrap one that was."""
    return callable(hook) and getattr(hook, "template", None) is hook


def quiet(hook: Template) -> Template:
    """Mark a hook that logs nothing, and that stops training or requests a checkpoint on all ranks or on none.

    After a hook without this mark, the ranks of a run write their logs together, because any of them may have logged
    something, and so they wait for each other. Marking a hook that is called at every update saves that wait. A
    subclass that overrides the hook has to mark its own version.
    """
    hook.is_quiet = True  # type: ignore[attr-defined]
    return hook


def is_quiet(hook: Any) -> bool:
    """Whether a hook is marked with ``quiet``."""
    return getattr(hook, "is_quiet", False)


class CallbackBase:
    """Watches a run, evaluates it, or acts on it, without the loop knowing what it does.

    A callback overrides the protected hooks that it needs (``_before_training``, ``_track_after_update_step`` ...). The
    public ones are templates: they switch gradients off and call the protected one. Overriding a template, a method
    that is named like a hook and that nothing calls, and arguments that do not fit are a TypeError when the class is
    defined. A hook that no callback of a run overrides costs nothing.

    The model is in evaluation mode in all hooks, except for those that come right before the forward and the backward
    pass: ``_before_every_update``, ``_before_every_accumulation_step`` and ``_before_every_backward``. Only a mode that
    is set there, such as that of a frozen BatchNorm, lasts. Gradients that a hook leaves behind are discarded; between
    the backward pass and the optimizer's step they are an error. Gradients of the update may be changed in place there.

    In the hooks of an accumulation step, ``update_counter.accumulation_step`` is its number, from 0, and
    ``update_counter.accumulation_steps`` how many this update has.

    Where several ranks train, every hook fires on all of them, in the same order: those of an accumulation step for the
    parts of the batch that are the rank's, all others with the same weights and gradients. Metrics that differ are
    averaged, files are those of rank 0, and ``_after_log`` gets the same values everywhere. For what ranks have to
    exchange there is ``self.data_container.world``.

    A stateful callback stores its state in one of two ways: small state through ``state_dict`` and
    ``load_state_dict``; large tensors in files of their own, which it announces with
    ``checkpoint_writer.add_tensors`` and reads back in ``resume_from_checkpoint``.

    What a hook draws at random depends on the seed, the callback's name, the hook and the update only: the generators
    are seeded before it, unless it is marked with ``keyed_random.uses_no_rng``. That takes about 9 us, and 100 us for
    the hooks between forward pass and step, after which the generators of training are restored. A thread that it
    starts needs a generator of its own: it may draw while training does.

    Metrics go through ``self.writer``; the step is the current update::

        self.writer.add_scalar("accuracy/test", 0.97)
        self.writer.add_scalar("accuracy/test", 0.97, logger=self.logger, format_str=".2f")

    Args:
        trainer: Trainer of the run.
        model: Model of the run.
        data_container: All datasets of the run.
        tracker: Tracker of the run.
        log_writer: Collects the metrics of all callbacks, as ``self.writer``; there is one per run.
        checkpoint_writer: Writes the checkpoints of the run.
        metric_property_provider: Knows whether higher or lower is better for a metric.
        name: Key of the callback in the config, and of its state in a checkpoint. A callback that is built by hand
            gets its name when it becomes part of a run.

    Attributes:
        logs: Patterns of the metric keys that this callback logs, such as ``accuracy/{dataset_key}``. ``*`` stands for
            anything, and a word in braces for the argument of that name, which the constructor has to keep as an
            attribute of the same name. ``accuracy{_heads}`` is ``accuracy_HEAD`` for each of the ``heads``, and
            ``accuracy`` if there are none. ``{/weights}`` is empty for the live weights, and ``/NAME`` for each of the
            others that are evaluated. With None the keys are unknown before training: a callback that watches a
            misspelt one of them is noticed only at the end.
        offers: Patterns of the same kind: the names of the weights that this callback offers for evaluation.
        tags: Patterns of the same kind: the tags that this callback gives to checkpoints, for ``weights_of``.
        merges_states: Whether ``merge_state_dicts`` loses nothing, so that every rank can go on from its result, such
            as the sums of each part of the batch. Then a checkpoint has that instead of the states of the ranks.
        replaces_state: Whether what ``state_dict`` has returned never changes afterwards, as hooks make new tensors
            instead of changing old ones in place. Then it is not copied before every hook that may fail, which saves
            10 us an update in the hooks before the optimizer's step.
        next_time: When ``timed_callback`` is due, by ``time.monotonic()``; a callback that overrides it sets this.
    """

    logs: ClassVar[Sequence[str] | None] = None
    offers: ClassVar[Sequence[str] | None] = ()
    tags: ClassVar[Sequence[str] | None] = ()
    merges_states: ClassVar[bool] = False
    replaces_state: ClassVar[bool] = False
    next_time: float = inf

    def __init__(
        self,
        trainer: SgdTrainer,
        model: ModelBase,
        data_container: DataContainer,
        tracker: BaseTracker,
        log_writer: LogWriter,
        checkpoint_writer: CheckpointWriter,
        metric_property_provider: MetricPropertyProvider,
        name: str | None = None,
    ) -> None:
        self.name = name
        self.trainer = trainer
        self.model = model
        self.data_container = data_container
        self.tracker = tracker
        self.writer = log_writer
        self.checkpoint_writer = checkpoint_writer
        self.metric_property_provider = metric_property_provider

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        templates = {name for base in cls.__mro__ for name, value in vars(base).items() if is_template(value)}
        for name in templates:
            if not is_template(getattr_static(cls, name)):  # by itself, or by a mixin
                raise TypeError(f"{cls.__name__} overrides the template '{name}': override '_{name}' instead")
        check_overridden(cls, {f"_{name}" for name in templates})

    @property
    def display_name(self) -> str:
        """The name of the callback in messages: its name, or that of its class if it has none."""
        return self.name or type(self).__name__

    @property
    def logger(self) -> logging.Logger:
        """Logger for the terminal and the run's log file."""
        return logging.getLogger(f"ksuit_runner.callbacks.{self.display_name}")

    @property
    def path_provider(self) -> PathProvider:
        """Paths of the run's files and folders."""
        return self.checkpoint_writer.path_provider

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state that a checkpoint stores, or None if there is none.

        Plain values, lists, dicts, arrays and tensors only: a checkpoint is read without unpickling objects.
        """
        return None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned when the checkpoint was written."""

    def merge_state_dicts(self, state_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return one state for all ranks of a run, made of those of the ranks that have written a checkpoint.

        A resume with another number of ranks needs this method, if the states differ: each rank calls it, and loads the
        result. With the same number, each rank gets its own state back.

        Args:
            state_dicts: What ``state_dict`` returned on each rank, in their order.
        """
        raise NotImplementedError

    def resume_from_checkpoint(self, resumption_paths: PathProvider, model: ModelBase) -> None:
        """Restore large state from the files of the checkpoint.

        Args:
            resumption_paths: Paths of the run, with ``resumption_paths.checkpoint_dir`` that of the checkpoint.
            model: Model of the run, with its weights already loaded.
        """

    def close(self) -> None:
        """Release what the callback holds (a terminal, a file); called once at the end of a run, however it ends."""

    @template
    def before_training(self, update_counter: UpdateCounter) -> None:
        """Called once, before the first update of a run or after a resume.

        Args:
            update_counter: Position of the run: ``epoch``, ``update``, ``sample``. That is so in every hook.
        """
        self._before_training(update_counter=update_counter)

    @template
    def after_training(self, update_counter: UpdateCounter) -> None:
        """Called once, after the last update."""
        self._after_training(update_counter=update_counter)

    @template
    def on_exception(self, error: BaseException) -> None:
        """Called when training ends with an error.

        Args:
            error: What was raised. It is raised again after all callbacks were called.
        """
        self._on_exception(error=error)

    @template
    def before_every_update(self, update_counter: UpdateCounter) -> None:
        """Called before an update, whose batch is already on the device."""
        self._before_every_update(update_counter=update_counter)

    @template
    def before_every_accumulation_step(self, update_counter: UpdateCounter, batch: Any) -> None:
        """Called before the forward pass of an accumulation step.

        Args:
            update_counter: Position of the run.
            batch: The samples of the step, on the device, as the dataset's samples collate: mostly
                ``(inputs, targets)``, both of shape (samples, ...).
        """
        self._before_every_accumulation_step(update_counter=update_counter, batch=batch)

    @template
    def before_every_backward(self, update_counter: UpdateCounter, losses: Losses) -> None:
        """Called between the forward and the backward pass of an accumulation step.

        Args:
            update_counter: Position of the run.
            losses: Losses of ``training_step`` by name, each of shape (), with their graph; ``total`` is minimized.
        """
        self._before_every_backward(update_counter=update_counter, losses=losses)

    @template
    def track_after_accumulation_step(
        self, update_counter: UpdateCounter, batch: Any, losses: Losses, outputs: Any
    ) -> None:
        """Called after the backward pass of an accumulation step.

        Args:
            update_counter: Position of the run; the update is not counted yet.
            batch: The samples of the step, as in ``before_every_accumulation_step``.
            losses: Losses by name, each of shape (), detached, on the device: reading one waits for the device.
            outputs: The outputs of ``training_step``: those of the model, such as scores of shape (samples, classes).
        """
        self._track_after_accumulation_step(update_counter=update_counter, batch=batch, losses=losses, outputs=outputs)

    @template
    def before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        """Called before the optimizer's step, with the gradients of the whole update, not clipped yet.

        The gradients are in ``.grad`` of the parameters; with ``precision: float16`` they are not scaled any more.
        An update that is skipped, because its loss is not finite, has no step.
        """
        self._before_every_optimizer_step(update_counter=update_counter)

    @template
    def track_after_update_step(self, update_counter: UpdateCounter) -> None:
        """Called after the optimizer's step; the update is counted."""
        self._track_after_update_step(update_counter=update_counter)

    @template
    def after_update(self, update_counter: UpdateCounter) -> None:
        """Called after an update, once all callbacks have tracked it."""
        self._after_update(update_counter=update_counter)

    @template
    def after_epoch(self, update_counter: UpdateCounter) -> None:
        """Called after the last update of an epoch."""
        self._after_epoch(update_counter=update_counter)

    @template
    def after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        """Called when the metrics of an update were written, to react to their values.

        It comes after all periodic callbacks and before the checkpoint, whatever the order of the callbacks. Metrics
        that are logged here belong to the same update; it is called again with those that are new.

        Args:
            update_counter: Position of the run.
            metrics: Values by key, those of this update that were not passed yet.
        """
        self._after_log(update_counter=update_counter, metrics=metrics)

    @template
    def timed_callback(self, update_counter: UpdateCounter) -> None:
        """Called after an update once ``time.monotonic()`` has reached ``next_time``, which the hook then sets anew.

        Until then it costs nothing: the loop reads the clock once for all callbacks. A resumed run, or another rank,
        calls it at other updates. So it must not log or change anything that belongs to the run: it shows something, or
        asks the process to end, as a signal does.
        """
        self._timed_callback(update_counter=update_counter)

    def _before_training(self, update_counter: UpdateCounter) -> None: ...
    def _after_training(self, update_counter: UpdateCounter) -> None: ...
    def _on_exception(self, error: BaseException) -> None: ...
    def _before_every_update(self, update_counter: UpdateCounter) -> None: ...
    def _before_every_accumulation_step(self, update_counter: UpdateCounter, batch: Any) -> None: ...
    def _before_every_backward(self, update_counter: UpdateCounter, losses: Losses) -> None: ...
    def _track_after_accumulation_step(
        self, update_counter: UpdateCounter, batch: Any, losses: Losses, outputs: Any
    ) -> None: ...
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None: ...
    def _track_after_update_step(self, update_counter: UpdateCounter) -> None: ...
    def _after_update(self, update_counter: UpdateCounter) -> None: ...
    def _after_epoch(self, update_counter: UpdateCounter) -> None: ...
    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None: ...
    def _timed_callback(self, update_counter: UpdateCounter) -> None: ...
