"""The trainer: what a user configures, overrides and asks about training, and the state of training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ksuit_runner.config.types import NonNegativeInt, PositiveFloat, PositiveInt, check_numbers
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.fetch_batch import Part
from ksuit_runner.data.shared_pass import EvaluationWatcher
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.errors import CheckpointError, KsuitError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.models.base import ModelBase
from ksuit_runner.schedule import Schedule
from ksuit_runner.tensors.device import to_device
from ksuit_runner.tensors.layout import lay_out_channels_last
from ksuit_runner.trainer.activations import checkpoint_activations
from ksuit_runner.trainer.backward import allow_several_passes
from ksuit_runner.trainer.batch import batch_size
from ksuit_runner.trainer.batch_gradients import BatchGradients, WholeBatch
from ksuit_runner.trainer.checks import (
    check_all_are_held,
    check_last_batch,
    check_parts,
    check_subclass,
    check_takes_turn,
)
from ksuit_runner.trainer.freezing import Freezing
from ksuit_runner.trainer.gradient_sums import GradientSums
from ksuit_runner.trainer.lazy_layers import materialize
from ksuit_runner.trainer.loss_check import LossCheck
from ksuit_runner.trainer.loss_weights import LossWeights
from ksuit_runner.trainer.losses import Losses, LossReader
from ksuit_runner.trainer.modes import Modes
from ksuit_runner.trainer.optimizer_specs import ONLY, OptimizerSpec, SharedSettings
from ksuit_runner.trainer.optimizer_step import Evaluation, OptimizerStep
from ksuit_runner.trainer.optimizers import build_optimizers
from ksuit_runner.trainer.part_buffers import PartBuffers
from ksuit_runner.trainer.parts import BatchParts, WeighedPart
from ksuit_runner.trainer.precision import Precision
from ksuit_runner.trainer.running_losses import RunningLosses
from ksuit_runner.trainer.shared_outputs import SharedOutputs
from ksuit_runner.trainer.step_writer import StepWriter
from ksuit_runner.trainer.tensor_note import misfits_explained, note_tensors
from ksuit_runner.trainer.update import Update
from ksuit_runner.trainer.update_snapshot import UpdateSnapshot

_LOGGER = logging.getLogger(__name__)


class SgdTrainer:
    """Trains a model by gradient descent on ``(inputs, targets)`` batches; subclasses override ``training_step``.

    Args:
        model: Model of the run; it is moved to the device.
        data_container: Datasets of the run.
        optimizer: Builds the optimizer: a class of ``torch.optim`` with its arguments; or several by name.
        schedule: Builds the learning-rate schedule for an optimizer and a number of updates, or is a class of
            ``torch.optim.lr_scheduler`` with its arguments, in updates.
        weight_decay_schedule: Builds the same for the weight decay; None leaves it as it is.
        loss: Module that maps (outputs, targets) to the mean loss over the samples, or over what its method
            ``count(targets)`` returns; the losses of torch are known. Its parameters are trained, under
            names that begin with ``loss.``, and its state is part of the trainer's.
        max_epochs: End after this many epochs; with 0 nothing is trained, and every periodic callback runs once.
        max_updates: End after this many updates.
        max_samples: End with the update that reaches this many samples. The first of these ends counts.
        accumulation_steps: Number of parts of a batch, a multiple of the number of ranks. Each part is fetched and
            computed by itself; the gradients are those of the whole batch.
        clip_norm: Largest norm of all gradients together, or None for no clipping.
        clip_value: Largest absolute value of an element of a gradient, or None; it comes before ``clip_norm``.
        precision: Type in which forward and loss are computed; weights stay in float32.
        compile: Compile the model's forward pass; text is a mode of ``torch.compile``.
        channels_last: Keep the weights of convolutions in the memory layout that GPUs with tensor cores compute in.
        activation_checkpointing: Patterns of the names of modules whose activations are computed again in the backward
            pass, see ``activations.checkpoint_activations``; None keeps all of them.
        device: ``auto``, or a device of torch.
        deterministic: Ask torch for deterministic kernels; the exact resume depends on it.
        tf32: Compute matrix products and convolutions of float32 with the precision of TF32, see ``chosen_kernels``.
        reference_batch_size: Batch size that the learning rates are meant for: they are multiplied with the actual
            batch size divided by this one (Goyal et al., 2017, https://arxiv.org/abs/1706.02677). None leaves them.
        parameter_rules: Options by pattern of parameter names, see ``build_optimizer``; a rule of None is left out.
        freeze: Patterns of the names of parameters that are not trained, or rules that say from when to when, see
            ``freezing.Freezing``.
        nan_loss: What a non-finite loss does: ``fail`` ends the run, ``skip`` skips the update, ``warn`` warns.
        turns: Names of the optimizers that step at one update after the other, such as ``[critic, critic, generator]``;
            ``training_step(batch, model, turn)`` is then told whose turn it is. With None all of them step at every
            update.
        max_skips: Largest number of updates in a row that ``skip`` skips; one more ends the run.
        loss_weights: Factors of the losses that ``training_step`` names and whose sum is minimized; by default it
            returns that sum as ``total``.
        strategy: How the ranks of the run share its training; by default there is one.

    Attributes:
        strategy: How the ranks of the run share its training.
        counter: Position and end of the run.
        offers: Patterns of the names of weights that a subclass offers for evaluation, see ``CallbackBase``.
        evaluation_models: Models to evaluate, by the name of their weights; the live ones have the empty name.
        callback_states: Returns the states of the run's callbacks by name.
        batch_parts: Knows how many samples the present batch or its parts have.
        watch_evaluation: Is told before each batch of an evaluation, see ``EvaluationWatcher``; None if nobody looks.
        shared_outputs: Computes the outputs for the batch that several callbacks evaluate; None at all other times.
        evaluates_in_order: Whether what ``training_step`` computes in an evaluation depends on the batches before, so
            that ranks cannot share them; a subclass says so.
        sums_up: Whether the total loss is a sum over the samples, and not a mean.
        loss_weights: Factors of the losses whose sum is minimized; empty if ``training_step`` returns a ``total``.
        has_extra_state: Whether the class carries a state of its own.
        freezing: Freezes and thaws parameters; None if nothing is frozen.
        writer: Logs what ``training_step`` computes besides its losses.
        modes: Ensures that only updates compute in training mode.
        optimizers: The optimizers with their schedules.
        optimizer_step: Lets them step.
        update: Does an update.
        loss_check: Acts on non-finite losses.
        running_losses: Adds up the losses of training.

    Raises:
        ConfigError: The device is not available, or an argument is out of range.
    """

    evaluates_in_order: ClassVar[bool] = False
    offers: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        model: ModelBase,
        data_container: DataContainer,
        optimizer: Callable[..., Optimizer] | Mapping[str, OptimizerSpec],
        schedule: Callable[..., Schedule],
        loss: nn.Module,
        weight_decay_schedule: Callable[..., Schedule] | None = None,
        max_epochs: NonNegativeInt | None = None,
        max_updates: NonNegativeInt | None = None,
        max_samples: NonNegativeInt | None = None,
        accumulation_steps: PositiveInt = 1,
        clip_norm: PositiveFloat | None = None,
        clip_value: PositiveFloat | None = None,
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
        compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False,
        channels_last: bool = False,
        activation_checkpointing: Sequence[str] | None = None,
        device: str = "auto",
        deterministic: bool = True,
        tf32: bool | None = None,
        reference_batch_size: PositiveInt | None = None,
        parameter_rules: Mapping[str, Mapping[str, Any] | None] | None = None,
        freeze: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
        nan_loss: Literal["fail", "skip", "warn"] = "fail",
        max_skips: NonNegativeInt = 10,
        loss_weights: dict[str, float] | None = None,
        turns: Sequence[str] | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        check_numbers("PositiveFloat", "trainer", clip_norm=clip_norm, clip_value=clip_value)
        check_numbers("PositiveInt", "trainer", reference_batch_size=reference_batch_size)
        self.strategy = strategy or Strategy()
        check_parts(accumulation_steps, self.strategy.world.size)
        self.device = self.strategy.device(device)
        self.model = model.to(self.device)
        self.data_container = data_container
        data_container.pins_memory = self.device.type == "cuda"
        self._precision = Precision(precision, self.device)
        self.scaler = self._precision.scaler
        self._prepare_model(channels_last, activation_checkpointing, compile)
        self.loss = loss.to(self.device)
        self._loss = ModelBase(self.loss)
        self.modes = Modes(self.model, self.loss)
        for item in (self.model, self._loss):
            self.modes.put_back_of(item.kept_buffers)
        self._weights = LossWeights(self.loss)
        self._has_own_step = type(self).training_step is not SgdTrainer.training_step
        self.sums_up = self._weights.are_sums and not self._has_own_step
        self._warns_of_sum = self._weights.are_sums and not self.sums_up
        self.loss_weights = loss_weights or {}
        step_name = f"{type(self).__name__}.training_step"
        self._reader = LossReader(step_name, self.loss_weights)
        self.counter = data_container.new_counter(max_epochs, max_updates, max_samples)
        if self.strategy.is_sharded:
            check_last_batch(self.counter, accumulation_steps)
        self.accumulation_steps = accumulation_steps
        self.deterministic = deterministic
        self.tf32 = tf32
        self.freezing = Freezing(freeze, model.module, self.loss, self.counter, self.modes) if freeze else None
        self.optimizers = build_optimizers(
            optimizer if isinstance(optimizer, Mapping) else {ONLY: OptimizerSpec(optimizer)},
            SharedSettings(
                schedule,
                weight_decay_schedule,
                clip_value=clip_value,
                rules=parameter_rules,
                lr_scale=data_container.batch_size / reference_batch_size if reference_batch_size else 1.0,
                turns=turns,
            ),
            self.model,
            self.loss,
            self.counter,
            self.strategy,
        )
        if turns is not None:
            check_takes_turn(self.training_step, step_name)
        self.optimizer_step = OptimizerStep(self.optimizers, clip_norm, self.scaler, self.strategy)
        self.evaluation_models: dict[str, nn.Module] = {"": self.model}
        self.callback_states: Callable[[], Mapping[str, Any]] = dict
        self.loss_check = LossCheck(nan_loss, is_late=self.device.type != "cpu", max_skips=max_skips)
        self.running_losses = RunningLosses(self.sums_up)
        self.shared_outputs: SharedOutputs | None = None
        self.watch_evaluation: EvaluationWatcher | None = None
        self.writer = StepWriter(self.batch_size, self.strategy.world)
        # The mean over nothing is NaN: parts without any target are left out. A step of a subclass may count others.
        self.batch_parts = BatchParts(
            data_container.samples_in,
            self.weight if accumulation_steps > 1 else None,
            leaves_out=not (self._has_own_step or self.strategy.is_sharded),
        )
        self.has_extra_state = type(self).extra_state is not SgdTrainer.extra_state
        modules = (self.model.module, self.loss)
        snapshot = UpdateSnapshot(modules, self if self.has_extra_state else None, self.strategy)
        self._gradients = self._batch_gradients(PartBuffers(snapshot.buffers))
        if self.optimizers.evaluate_again:
            self._gradients.keep_loss()
        self.update = Update(
            self.forward,
            self.batch_parts,
            self._gradients,
            self.optimizer_step,
            snapshot,
            self.loss_check,
            self.writer,
            self.counter,
        )

    def _prepare_model(
        self, channels_last: bool, activation_checkpointing: Sequence[str] | None, compile: bool | str
    ) -> None:
        """Give the model its final parameters and its form, in the order in which one thing builds on another."""
        materialize(self.model, self._first_inputs, self.data_container.seed)
        if channels_last:
            lay_out_channels_last(self.model.module)
        if activation_checkpointing:
            checkpoint_activations(self.model.module, activation_checkpointing)
        self.strategy.wrap(self.model, self._precision.dtype)
        if compile:
            self.strategy.compile(self.model.module, mode=None if compile is True else compile)

    def _batch_gradients(self, buffers: PartBuffers) -> BatchGradients:
        parameters, backward = self.optimizers.parameters, self.optimizer_step.backward
        if self.accumulation_steps == 1:
            return WholeBatch(parameters, backward, needs_all_passes=self.strategy.is_sharded)
        if len(self.loss_weights) > 1:  # each part has a backward pass for each loss
            allow_several_passes(self.model)
        return GradientSums(
            parameters,
            backward,
            self.strategy,
            self.accumulation_steps,
            self.data_container.batch_size,
            list(self.loss_weights or ["total"]),
            self.sums_up,
            buffers,
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_subclass(cls, SgdTrainer)

    # What subclasses override

    def training_step(self, batch: Any, model: nn.Module) -> tuple[Any, Any]:
        """Compute the losses of a batch.

        Args:
            batch: ``(inputs, targets)``, with shapes (samples, ...), on the device.
            model: The live model in training; in evaluation possibly another one.

        Returns:
            The loss, or losses by name, and the model's outputs, with shape (samples, ...).

            A loss is a scalar tensor, the mean over the samples or over what ``weight`` returns. Or it is ``(mean,
            count)``, where ``count`` is the number of things in this batch that it is the mean over, such as tokens:
            then its gradient and its logged means are those over everything, however batches are cut. A mean over
            nothing may be NaN. Of several losses ``total`` is minimized, or the sum that ``loss_weights`` describes;
            the others are logged.
        """
        inputs, targets = self.inputs_and_targets(batch)
        outputs = model(inputs) if self.shared_outputs is None else self.shared_outputs(model, inputs)
        if outputs.ndim > 2 and outputs.shape[:-1] == targets.shape:  # classes last: one prediction per token
            return {"total": self.loss(outputs.flatten(0, -2), targets.flatten())}, outputs
        return {"total": self.loss(outputs, targets)}, outputs

    def inputs_and_targets(self, batch: Any) -> tuple[Any, Any]:
        """Return the inputs of the model and the targets of the loss.

        Raises:
            KsuitError: The batch is not a pair.
        """
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            raise KsuitError(
                f"a batch is a {kind} and not a pair of inputs and targets. Override `inputs_and_targets` of the "
                "trainer, or `training_step`",
                path="data",
            )
        return batch[0], batch[1]

    def batch_size(self, batch: Any) -> int:
        """Return the number of samples in a batch, or in a part of it: its weight in a mean over samples.

        The data container counts what it fetches; for anything else the tensors decide, see ``batch.batch_size``.
        """
        return batch_size(batch, self.batch_parts.samples(batch))

    def weight(self, batch: Any) -> float | Tensor:
        """Return the weight of a batch's total loss in a mean over several: the number of things it is a mean over.

        These are the targets that the loss counts, see ``LossWeights``, or else the samples. A subclass whose
        ``training_step`` takes the mean over something else, such as tokens, overrides this as well.
        """
        samples = self.batch_size(batch)
        if self.sums_up:
            return samples
        try:
            _, targets = self.inputs_and_targets(batch)
        except KsuitError:  # only the training step knows them
            targets = None
        return self._weights.of(targets, samples)

    def part_weight(self, batch: Any) -> float | Tensor:
        """Return the weight of the loss of a part of the training batch, or of the whole, in a mean over updates."""
        weight = self.batch_parts.weight(batch)
        if weight is not None:
            return weight
        return self.weight(batch) if self._weights.are_uneven else self.batch_size(batch)

    @uses_no_rng
    def start_update(self, parts: Sequence[Part]) -> Sequence[WeighedPart]:
        """Start an update. A subclass overrides it to reset what it gathers over the parts of a batch.

        Before an override is called, the generators are seeded, in the same way on all ranks.

        Args:
            parts: This rank's parts of the batch, on the device.

        Returns:
            Those of them that are computed, with the weights of their losses.
        """
        return self.update.start(parts)

    def step(self, again: Evaluation | None = None) -> None:
        """Update the weights. A subclass overrides it to let something follow them, such as a teacher.

        What it draws is the same on all ranks.

        Args:
            again: Evaluates the batch for optimizers whose step asks for it.
        """
        self.update.step(again)

    def extra_state(self) -> Any:
        """Return the state that a subclass carries from update to update, such as a hidden state or a teacher.

        Like the state of a callback, it consists of plain values, lists, dicts, arrays and tensors, which is checked
        before the first update. ``training_step`` may change it in an update: it is copied before each one, and
        restored if the update fails or is skipped. In evaluations, which call ``training_step`` with a model in
        evaluation mode, it must not change. Of several ranks each has its own, of the parts that it computes.
        """
        return None

    def load_extra_state(self, state: Any) -> None:
        """Restore what ``extra_state`` returned; tensors from a checkpoint are on the CPU."""

    def merge_extra_states(self, states: Sequence[Any]) -> Any:
        """Return one state for all ranks, from those of the ranks that have written a checkpoint, in their order.

        A resume with another number of ranks needs this method, if the states differ. With the same number, each rank
        gets its own back.
        """
        raise NotImplementedError

    # What the loop and callbacks use

    def forward(self, batch: Any, model: nn.Module | None = None) -> tuple[Losses, Any]:
        """Compute losses and outputs of a batch in the run's precision, with the live model or another one."""
        if self.model.training:
            return self._forward(batch, model)
        used = self.model if model is None else model
        watching = used.kept_buffers.watch(used.module) if isinstance(used, ModelBase) else nullcontext()
        with self._loss.kept_buffers.watch(self.loss), watching:  # a step may call parts of the model by themselves
            return self._forward(batch, model)

    def _forward(self, batch: Any, model: nn.Module | None) -> tuple[Losses, Any]:
        with self._precision.computing():
            if self.counter.update:
                result = self._call_step(batch, model)
            else:
                with misfits_explained(self.loss):
                    result = self._call_step(batch, model)
            losses, outputs = self._reader.read(result)
        if self._warns_of_sum:
            self._warns_of_sum = False
            _LOGGER.warning("loss: it sums up; what %s.training_step returns counts as a mean", type(self).__name__)
        return losses, outputs

    def _call_step(self, batch: Any, model: nn.Module | None) -> Any:
        try:
            if not self.optimizers.turns.are_taken:
                return self.training_step(batch, model or self.model)
            turn = self.optimizers.turns.at(self.counter.update).name if model is None else None
            return self.training_step(batch, model or self.model, turn)  # type: ignore[call-arg]
        except Exception as error:
            note_tensors(error)
            if "does not require grad" in str(error) and not torch.is_grad_enabled():
                error.add_note(
                    "in an evaluation, which computes without gradients: the trainer does the backward pass and the "
                    "step; a loss that is made of gradients computes them under torch.enable_grad()"
                )
            raise

    def keep_total_loss(self) -> None:
        """Have ``total_loss`` available from the end of each backward pass on; to be called before training."""
        self._gradients.keep_loss()

    @property
    def total_loss(self) -> Tensor:
        """The loss of the whole batch, the same on all ranks.

        It is there after ``keep_total_loss``, or if an optimizer evaluates the loss again.
        """
        return self._gradients.total

    def skip_update(self) -> None:
        """Skip the present update; to be called in ``_before_every_optimizer_step``, on all ranks or on none.

        The update counts, but the optimizer does not step, and what the update has changed otherwise is restored, as
        for a loss that is not finite.
        """
        self.update.must_skip = True

    def predict(self, inputs: Any, model: nn.Module | None = None) -> Any:
        """Compute a model's outputs in the run's precision; in a hook, the live model is in evaluation mode."""
        model = model or self.model
        is_watched = model is self.model and model.training and not torch.is_grad_enabled()
        with self.evaluation() if is_watched else nullcontext(), self._precision.computing():
            return model(inputs) if self.shared_outputs is None else self.shared_outputs(model, inputs)

    @uses_no_rng
    def to_device(self, batch: Any) -> Any:
        """Move a batch to the device of the run; before an override is called, the generators are seeded."""
        moved = to_device(batch, self.device)
        self.batch_parts.note(moved, self.data_container.samples_in(batch))
        return moved

    def add_evaluation_model(self, name: str, model: nn.Module) -> None:
        """Offer other weights for evaluation, by a name in ``offers`` of the class; their metrics end in ``/name``."""
        if name in self.evaluation_models:
            raise KsuitError(f"two of them offer weights named '{name}' for evaluation", path="callbacks")
        self.evaluation_models[name] = model
        if isinstance(model, ModelBase):
            self.modes.put_back_of(model.kept_buffers)

    def evaluation(self) -> AbstractContextManager[None]:
        """Switch model, loss and optimizers to evaluation mode while the block runs, and then back; see ``Modes``."""
        switching = [member for member in self.optimizers.members.values() if member.switches_weights]
        return self.modes.evaluation(switching, self.optimizers.parameters)

    def check_parameters(self) -> None:
        """Check that the optimizer has every parameter that is to be trained.

        Raises:
            KsuitError: A parameter was replaced or added since the trainer was built, and would never be trained.
        """
        check_all_are_held(self.optimizers.parameters, self.model.module, self.loss)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Let a schedule that steps with a metric see the values that were logged after this update."""
        for schedule in self.optimizers.metric_schedules():
            if (value := metrics.get(str(schedule.metric))) is not None:
                schedule.observe(value, self.counter.update)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates by ``GROUP`` of parameters, or ``OPTIMIZER/GROUP`` of several optimizers."""
        return self.optimizers.options("lr")

    @property
    def optimizer(self) -> Optimizer:
        """The only optimizer; several are in ``optimizers.members``."""
        return self.optimizers.only.optimizer

    @property
    def schedule(self) -> Schedule:
        """The schedule of the only optimizer."""
        return self.optimizers.only.schedules["schedule"]

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of gradients before they were clipped together, at the last step, a scalar; None without clipping."""
        return self.optimizer_step.grad_norm

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return optimizers (by parameter name), schedules, loss, scaler, position, and the callbacks' states by name.

        The weights have a file of their own; ``arrangements`` is what that file cannot hold, such as their strides.
        """
        extra = {"extra": self.extra_state()} if self.has_extra_state else {}
        return {
            **self.optimizers.state_dict(),
            "loss": self._loss.tensors(),
            "skips": self.loss_check.skips,
            "grad_norms": self.optimizer_step.state_dict(),
            "scaler": self.scaler.state_dict(),
            "counter": self.counter.state_dict(),
            "data": self.data_container.state_dict(self.counter.update),
            "callbacks": self.callback_states(),
            "arrangements": {"model": self.model.arrangement(), "loss": self._loss.arrangement()},
            **extra,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], same_settings: bool = True) -> None:
        """Load a stored state.

        Args:
            state_dict: What ``state_dict`` returned; the callbacks load their states themselves. Without ``loss`` the
                loss keeps its own state, and the optimizer starts over with its parameters.
            same_settings: Whether learning rate and schedule are those of the stored run. A fork may have others: it
                keeps its own and advances its own schedule to the stored position.

        Raises:
            CheckpointError: The stored state belongs to another optimizer or loss.
        """
        self.counter.load_state_dict(state_dict["counter"])
        self.data_container.load_state_dict(state_dict.get("data", {}), self.counter.update)
        if self.freezing is not None:
            self.freezing.apply(self.counter.update)
        self.loss_check.skips = state_dict.get("skips", 0)
        if "grad_norms" in state_dict:  # earlier versions stored none
            self.optimizer_step.load_state_dict(state_dict["grad_norms"], self.device)
        arrangements = state_dict.get("arrangements", {})
        if "model" in arrangements:
            self.model.arrange(arrangements["model"])
        if "loss" in state_dict:
            self._load_loss(state_dict["loss"], arrangements.get("loss"))
        if self.has_extra_state and "extra" in state_dict:
            self.load_extra_state(state_dict["extra"])
        self.optimizers.load_state_dict(state_dict, self.counter.update, same_settings, "loss" in state_dict)
        if self.scaler.is_enabled() and state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])

    def _load_loss(self, tensors: Mapping[str, Any], arrangement: Mapping[str, Any] | None) -> None:
        try:
            self._loss.load(tensors, arrangement)
        except RuntimeError:
            held = list(tensors) or "nothing"
            raise CheckpointError(f"the checkpoint has the state of another loss, with {held}", path="loss") from None
        if arrangement is not None:
            self._loss.arrange(arrangement)

    def _first_inputs(self) -> Any:
        return self.inputs_and_targets(to_device(self.data_container.first_samples(), self.device))[0]
