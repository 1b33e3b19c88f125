"""The trainer: one update (forward, loss, backward, step) and the state of training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ksuit_runner.checkpoint.state_types import copy_state
from ksuit_runner.config.overridden import check_overridden
from ksuit_runner.config.types import PositiveInt
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.fetch_batch import Part
from ksuit_runner.data.shared_pass import EvaluationWatcher
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.errors import CheckpointError, ConfigError, KsuitError, did_you_mean
from ksuit_runner.models.base import ModelBase
from ksuit_runner.schedule import Schedule
from ksuit_runner.tensors.device import to_device
from ksuit_runner.tensors.layout import lay_out_channels_last
from ksuit_runner.trainer.activations import checkpoint_activations
from ksuit_runner.trainer.backward import allow_several_passes, backward
from ksuit_runner.trainer.batch import batch_size
from ksuit_runner.trainer.buffer_snapshot import BufferSnapshot
from ksuit_runner.trainer.freezing import Freezing
from ksuit_runner.trainer.gradient_sums import GradientSums
from ksuit_runner.trainer.gradients import forget_gradients, versions
from ksuit_runner.trainer.lazy_layers import materialize
from ksuit_runner.trainer.loss_check import LossCheck
from ksuit_runner.trainer.loss_weights import LossWeights
from ksuit_runner.trainer.losses import Losses, LossReader
from ksuit_runner.trainer.modes import Modes
from ksuit_runner.trainer.optimizers import (
    ONLY,
    Evaluation,
    OptimizerSpec,
    SkippedEvaluation,
    build_optimizers,
    check_positive,
)
from ksuit_runner.trainer.parameter_rules import named_parameters
from ksuit_runner.trainer.part_buffers import PartBuffers
from ksuit_runner.trainer.parts import BatchParts, WeighedPart
from ksuit_runner.trainer.running_losses import RunningLosses
from ksuit_runner.trainer.shared_outputs import SharedOutputs
from ksuit_runner.trainer.step_writer import StepWriter
from ksuit_runner.trainer.tensor_note import note_tensors

_LOGGER = logging.getLogger(__name__)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        parameter_rules: Options by pattern of parameter names, see ``optimizer.build_optimizer``; None takes one out.
        freeze: Patterns of the names of parameters that are not trained, or rules that say from when to when, see
            ``freezing.Freezing``.
        nan_loss: What a non-finite loss does: ``fail`` ends the run, ``skip`` skips the update, ``warn`` warns.
        turns: Whose step it is at one update after the other, by the names of the optimizers; ``training_step(batch,
            model, turn)`` is then told whose. With None all optimizers step at every update.
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
        total_loss: The loss of the whole batch, the same on all ranks, if an optimizer that evaluates it again or
            ``keep_total_loss`` asks for it.
        must_skip: Whether a callback has asked to skip the present update.
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
        max_epochs: int | None = None,
        max_updates: int | None = None,
        max_samples: int | None = None,
        accumulation_steps: PositiveInt = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
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
        max_skips: int = 10,
        loss_weights: dict[str, float] | None = None,
        turns: Sequence[str] | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        limits = {"clip_norm": clip_norm, "clip_value": clip_value, "reference_batch_size": reference_batch_size}
        check_positive(limits, "trainer")
        self.strategy = strategy or Strategy()
        _check_arguments(precision, accumulation_steps, max_skips, self.strategy.world.size)
        self.device = self.strategy.device(device)
        self.model = model.to(self.device)
        self.data_container = data_container
        data_container.pins_memory = self.device.type == "cuda"
        materialize(self.model, self._first_inputs, data_container.seed)
        if channels_last:
            lay_out_channels_last(self.model.module)
        if activation_checkpointing:
            checkpoint_activations(self.model.module, activation_checkpointing)
        self.strategy.wrap(self.model, PRECISIONS[precision])
        if compile:
            self.strategy.compile(self.model.module, mode=None if compile is True else compile)
        self.loss = loss.to(self.device)
        self._loss = ModelBase(self.loss)
        self.modes = Modes(self.model, self.loss)
        self._weights = LossWeights(self.loss)
        self._has_own_step = type(self).training_step is not SgdTrainer.training_step
        self.sums_up = self._weights.are_sums and not self._has_own_step
        self.counter = data_container.new_counter(max_epochs, max_updates, max_samples)
        if self.strategy.is_sharded:
            _check_last_batch(self.counter, accumulation_steps)
        self.accumulation_steps = accumulation_steps
        self.deterministic = deterministic
        self.tf32 = tf32
        self.freezing = Freezing(freeze, model.module, self.loss, self.counter, self.modes) if freeze else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.optimizers = build_optimizers(
            optimizer if isinstance(optimizer, Mapping) else {ONLY: OptimizerSpec(optimizer)},
            model.module,
            self.loss,
            self.device,
            self.counter,
            self.scaler,
            schedule,
            weight_decay_schedule,
            parameter_rules,
            turns,
            clip_norm,
            clip_value,
            lr_scale=data_container.batch_size / reference_batch_size if reference_batch_size else 1.0,
            strategy=self.strategy,
        )
        if turns is not None and len(signature(self.training_step).parameters) < 3:
            step = f"{type(self).__name__}.training_step"
            raise ConfigError(f"{step} has to take a turn: training_step(batch, model, turn)", path="trainer.turns")
        self.evaluation_models: dict[str, nn.Module] = {"": self.model}
        self.callback_states: Callable[[], Mapping[str, Any]] = dict
        self.loss_check = LossCheck(nan_loss, is_late=self.device.type != "cpu", max_skips=max_skips)
        self.running_losses = RunningLosses(self.sums_up)
        self.shared_outputs: SharedOutputs | None = None
        self.watch_evaluation: EvaluationWatcher | None = None
        self.batch_parts = BatchParts(data_container.samples_in)
        self._warns_of_sum = self._weights.are_sums and not self.sums_up
        self.loss_weights = loss_weights or {}
        self._reader = LossReader(f"{type(self).__name__}.training_step", self.loss_weights)
        self._dtype = PRECISIONS[precision]
        self._parameters = self.optimizers.parameters
        self.writer = StepWriter(self.batch_size, self.strategy.world)
        self._buffer_snapshots = [BufferSnapshot(module) for module in (self.model.module, self.loss)]
        self.total_loss = torch.zeros(())
        self._keeps_loss = self.optimizers.evaluate_again
        self.must_skip = False
        self._sums = None
        if accumulation_steps > 1:
            if len(self.loss_weights) > 1:  # each part has a backward pass for each loss
                allow_several_passes(self.model)
            self._sums = GradientSums(
                self._parameters,
                self.strategy,
                accumulation_steps,
                data_container.batch_size,
                list(self.loss_weights or ["total"]),
                self.sums_up,
                self.optimizers.evaluate_again,
                PartBuffers(self._buffer_snapshots),
            )
        self.has_extra_state = type(self).extra_state is not SgdTrainer.extra_state
        self._extra_snapshot: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, instead in (("state_dict", "extra_state"), ("load_state_dict", "load_extra_state")):
            if getattr(cls, name) is not getattr(SgdTrainer, name):
                raise TypeError(f"{cls.__name__} overrides '{name}': override '{instead}' instead")
        if hasattr(cls, "split"):
            raise TypeError(
                f"{cls.__name__} has a method 'split', which nothing calls: each part of a batch is fetched and "
                "collated by itself"
            )
        check_overridden(cls, hooks=(), extra={"training_step": 1})  # the turn

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

    def extra_state(self) -> Any:
        """Return the state that a subclass carries from update to update, such as a hidden state or a teacher.

        It is treated like a callback's: plain values, lists, dicts, arrays and tensors only, which is checked before
        the first update. It is copied before every update, whose ``training_step`` may change it; if the update fails
        or is skipped, it gets back what it was. Only updates may change it: ``training_step`` also serves
        evaluations, with a model in evaluation mode. Of several ranks each has its own, of the parts that it computes.
        """
        return None

    def load_extra_state(self, state: Any) -> None:
        """Restore what ``extra_state`` returned; tensors from a checkpoint are on the CPU."""

    def merge_extra_states(self, states: Sequence[Any]) -> Any:
        """Return one state for all ranks, from those of the ranks that have written a checkpoint, in their order.

        Where the ranks differ in it, each gets its own back. Another number of ranks needs this method.
        """
        raise NotImplementedError

    # The pieces of an update, in the order of the loop

    def take_snapshot(self) -> None:
        """Copy what an update changes before its step: the buffers, and the extra state."""
        self.writer.start()
        for snapshot in self._buffer_snapshots:
            snapshot.take()
        if self.has_extra_state:
            self._extra_snapshot = copy_state("trainer: extra_state()", self.extra_state())

    def roll_back(self) -> None:
        """Restore the buffers and the extra state from the snapshot."""
        self.strategy.reset()
        for snapshot in self._buffer_snapshots:
            snapshot.restore()
        if self.has_extra_state:
            self.load_extra_state(self._extra_snapshot)

    def start_update(self, parts: Sequence[Part]) -> Sequence[WeighedPart]:
        """Prepare for an update.

        Args:
            parts: This rank's parts of the batch, on the device.

        Returns:
            Those of them that are computed, with the weights of their losses.
        """
        self.batch_parts.start(parts)
        if self._sums is None:
            return [WeighedPart(part.batch, part.number, 1.0) for part in parts]
        weighed = self.batch_parts.weigh(parts, [self.weight(part.batch) for part in parts])
        # The mean over nothing is NaN: parts without any target are left out, unless a step of one's own counts others.
        computed = weighed
        if not (self._has_own_step or self.strategy.is_sharded):
            computed = [part for part in weighed if part.weight]
        self._sums.start(computed[-1].number if computed else -1, len(weighed) - len(computed))
        return computed

    def forward(self, batch: Any, model: nn.Module | None = None) -> tuple[Losses, Any]:
        """Compute losses and outputs of a batch in the run's precision, with the live model or another one."""
        with self._autocast():
            try:
                if not self.optimizers.has_turns:
                    result = self.training_step(batch, model or self.model)
                else:
                    turn = self.optimizers.turn(self.counter.update) if model is None else None
                    result = self.training_step(batch, model or self.model, turn)  # type: ignore[call-arg]
            except Exception as error:
                note_tensors(error)
                raise
            losses, outputs = self._reader.read(result)
        if self._sums is not None and losses.counts and torch.is_grad_enabled():
            losses.read_counts()
        if self._warns_of_sum:
            self._warns_of_sum = False
            _LOGGER.warning("loss: it sums up; what %s.training_step returns counts as a mean", type(self).__name__)
        return losses, outputs

    def forward_part(self, part: WeighedPart, logs: bool = True) -> tuple[Losses, Any]:
        """Compute losses and outputs of a part of the training batch; only here ``training_step`` can log."""
        if self._sums is not None:
            self._sums.begin()
        if logs:
            self.writer.begin(part.batch)
        try:
            return self.forward(part.batch)
        finally:
            self.writer.end()

    def leaves_out(self, losses: Losses, part: WeighedPart) -> bool:
        """Check the losses of a part of the batch, and return whether it is left out; see ``LossCheck``."""
        total = losses["total"] if self._sums is None else self._sums.counted(losses, part.weight)
        is_left_out = total is not None and self.loss_check.leaves_out(total, self.counter.update)
        if is_left_out and self.strategy.is_sharded:  # all ranks have to do as many passes
            self.backward(losses, part)
        return is_left_out

    def backward(self, losses: Losses, part: WeighedPart) -> None:
        """Add the gradients of a part of the batch to those of the parts before; what callbacks left is dropped."""
        if self._sums is not None:
            self._sums.add(part.number, losses, part.weight, self._backward)
            return
        self.forget_gradients()
        self._backward(losses["total"])
        if self._keeps_loss:
            self.total_loss = losses["total"].detach()

    def _backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Add the gradients of a loss; where optimizers take turns, only of the parameters whose turn it is."""
        inputs = None
        if self.optimizers.has_turns and not self.strategy.is_sharded:  # where other tensors are computed with
            inputs = self.optimizers.trained(self.counter.update)
        if inputs == []:  # all frozen at present
            return
        backward(self.scaler.scale(loss), retain_graph, inputs)

    def complete_gradients(self, word: UpdateWord) -> bool:
        """Complete the gradients after the last part of this rank, and return whether the step may follow.

        Not if the update is skipped, on which all ranks agree.

        Args:
            word: What this rank has to say to the others; then what all of them have said.

        Raises:
            LossError: A loss is not finite, and that is an error.
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        bad_loss, has_logged = self.loss_check.bad_loss, self.writer.has_logged
        if self._sums is not None:
            word.said += has_logged
            bad_loss = self._sums.finish(word, bad_loss, has_logged)
            self.total_loss, has_logged = self._sums.total, self._sums.has_logged
        if self.loss_check.must_skip(bad_loss, self.counter.update):
            return False
        if self.optimizers.has_turns:
            self.optimizers.drop_others(self.counter.update)
            self.optimizers.check_gradients(self.counter.update)
        if has_logged:
            self.writer.flush()
        return True

    def start_again(self) -> None:
        """Prepare for another evaluation of the batch."""
        self.roll_back()
        self.forget_gradients()
        if self._sums is not None:
            self._sums.start_again()

    def step(self, again: Evaluation | None = None) -> None:
        """Update the weights, drop the gradients, and advance the schedules.

        Args:
            again: Evaluates the batch for optimizers whose step asks for it.
        """
        try:
            self.optimizers.step(self.counter.update, again, self.loss_check.skips_updates)
        except SkippedEvaluation:
            self.skip_step()
            return
        self.forget_gradients()
        self.loss_check.skips = 0
        self.optimizers.advance()

    def unscale_gradients(self) -> None:
        """Divide the gradients of an update by the factor that keeps small ones in float16, unless that is done."""
        self.optimizers.unscale(self.counter.update)

    def skip_step(self) -> None:
        """Drop the gradients, and restore what the update has changed; only the schedules advance."""
        self.must_skip = False
        self.roll_back()
        self.writer.discard()
        self.optimizers.skip(self.counter.update)
        self.forget_gradients()
        self.loss_check.skips += 1
        self.optimizers.advance()

    def forget_gradients(self) -> None:
        """Drop the gradients of all parameters."""
        forget_gradients(self._parameters)

    def gradient_versions(self) -> list[int]:
        """Return a number for each gradient that changes when something is added to it."""
        return versions(self._parameters)

    # What callbacks use

    def keep_total_loss(self) -> None:
        """Keep the loss of the whole batch as ``total_loss``, from the end of the backward pass; before training."""
        self._keeps_loss = True
        if self._sums is not None:
            self._sums.keep_loss()

    def skip_update(self) -> None:
        """Leave out the optimizer's step, in ``_before_every_optimizer_step``, on all ranks alike.

        The update counts, and what else it has changed is restored, as if its loss had not been finite.
        """
        self.must_skip = True

    def predict(self, inputs: Any, model: nn.Module | None = None) -> Any:
        """Compute a model's outputs in the run's precision; in a hook, the live model is in evaluation mode."""
        model = model or self.model
        is_watched = model is self.model and model.training and not torch.is_grad_enabled()
        with self.evaluation() if is_watched else nullcontext(), self._autocast():
            return model(inputs) if self.shared_outputs is None else self.shared_outputs(model, inputs)

    def to_device(self, batch: Any) -> Any:
        """Move a batch to the device of the run."""
        moved = to_device(batch, self.device)
        self.batch_parts.note(moved, self.data_container.samples_in(batch))
        return moved

    def add_evaluation_model(self, name: str, model: nn.Module) -> None:
        """Offer other weights for evaluation; their metrics end in ``/name``, which ``offers`` of the class says."""
        if name in self.evaluation_models:
            raise KsuitError(f"two of them offer weights named '{name}' for evaluation", path="callbacks")
        self.evaluation_models[name] = model

    def evaluation(self) -> AbstractContextManager[None]:
        """Switch model, loss and optimizers to evaluation mode while the block runs, and then back; see ``Modes``."""
        switching = [member for member in self.optimizers.members.values() if member.switches_weights]
        return self.modes.evaluation(switching, self._parameters)

    def check_parameters(self) -> None:
        """Check that the optimizer has every parameter that is to be trained.

        Raises:
            KsuitError: A parameter was replaced or added since the trainer was built, and would never be trained.
        """
        held = set(map(id, self._parameters))
        named = named_parameters(self.model.module, self.loss)
        lost = [name for name, item in named.items() if item.requires_grad and id(item) not in held]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise KsuitError(
                f"the optimizer does not have '{lost[0]}'{more}, replaced or added since training began: "
                "it would never be trained. Change the values of a parameter in place, or build the model that way",
                path="model",
            )

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
        """Norm of the last update's gradients before they were clipped together, a scalar; None without clipping."""
        return self.optimizers.grad_norm

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

    def _autocast(self) -> Any:
        if self._dtype is torch.float32:  # an autocast context that changes nothing takes as long as a small layer
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)


def _check_arguments(precision: str, accumulation_steps: int, max_skips: int, ranks: int) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"there is no '{precision}'. {did_you_mean(precision, PRECISIONS)}", path="trainer.precision")
    if accumulation_steps < 1:
        raise ConfigError(f"at least 1 is needed, not {accumulation_steps}", path="trainer.accumulation_steps")
    if accumulation_steps % ranks:
        raise ConfigError(
            f"{accumulation_steps} parts of a batch cannot be divided among {ranks} ranks",
            path="trainer.accumulation_steps",
        )
    if max_skips < 0:
        raise ConfigError(f"it must not be negative, and is {max_skips}", path="trainer.max_skips")


def _check_last_batch(counter: UpdateCounter, parts: int) -> None:
    """Check that every batch has something for every rank."""
    last = counter.samples_per_epoch - (counter.updates_per_epoch - 1) * counter.batch_size
    if min(last, counter.batch_size) < parts:
        raise ConfigError(
            f"the last batch of an epoch has {last} samples, and {parts} parts have one each where parameters are "
            "spread over ranks: data.drop_last=true leaves it out",
            path="trainer.accumulation_steps",
        )
