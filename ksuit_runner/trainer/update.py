"""One update of the weights, in the pieces that the loop calls one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.fetch_batch import Part
from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.trainer.batch_gradients import BatchGradients
from ksuit_runner.trainer.loss_check import LossCheck
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.optimizer_step import Evaluation, OptimizerStep, SkippedEvaluation
from ksuit_runner.trainer.parts import BatchParts, WeighedPart
from ksuit_runner.trainer.step_writer import StepWriter
from ksuit_runner.trainer.update_snapshot import UpdateSnapshot


class Update:
    """Does one update; its methods are the pieces of an update, in the order in which the loop calls them.

    Args:
        compute: Computes losses and outputs of a part of the batch.
        parts: Knows how many samples the parts have and what they weigh.
        gradients: Turns the losses of the parts into gradients of the batch.
        optimizer_step: Changes the weights by them.
        snapshot: Holds what the update changes before that.
        loss_check: Acts on non-finite losses.
        writer: Logs what ``training_step`` computes besides its losses.
        counter: Position of the run.

    Attributes:
        must_skip: Whether a callback has asked to skip the present update.
    """

    def __init__(
        self,
        compute: Callable[[Any], tuple[Losses, Any]],
        parts: BatchParts,
        gradients: BatchGradients,
        optimizer_step: OptimizerStep,
        snapshot: UpdateSnapshot,
        loss_check: LossCheck,
        writer: StepWriter,
        counter: UpdateCounter,
    ) -> None:
        self.must_skip = False
        self._compute = compute
        self._parts = parts
        self._gradients = gradients
        self._optimizer_step = optimizer_step
        self._snapshot = snapshot
        self._loss_check = loss_check
        self._writer = writer
        self._counter = counter

    def take_snapshot(self) -> None:
        """Copy what the update changes before its step: the buffers, and the extra state."""
        self._writer.start()
        self._snapshot.take()

    def roll_back(self) -> None:
        """Restore the buffers and the extra state from the snapshot."""
        self._snapshot.restore()

    def start(self, parts: Sequence[Part]) -> Sequence[WeighedPart]:
        """Start with a batch.

        Args:
            parts: This rank's parts of it, on the device.

        Returns:
            Those of them that are computed, with the weights of their losses.
        """
        computed = self._parts.start(parts)
        self._gradients.start(computed, len(parts) - len(computed))
        return computed

    def forward(self, part: WeighedPart, logs: bool = True) -> tuple[Losses, Any]:
        """Compute losses and outputs of a part of the batch; only here ``training_step`` can log."""
        self._gradients.begin()
        if logs:
            self._writer.begin(part.batch)
        try:
            return self._compute(part.batch)
        finally:
            self._writer.end()

    def leaves_out(self, losses: Losses, part: WeighedPart) -> bool:
        """Check the losses of a part of the batch, and return whether it is left out; see ``LossCheck``."""
        total = self._gradients.counted(losses, part.weight)
        is_left_out = total is not None and self._loss_check.leaves_out(total, self._counter.update, part.batch)
        if is_left_out and self._gradients.needs_all_passes:
            self.backward(losses, part)
        return is_left_out

    def backward(self, losses: Losses, part: WeighedPart) -> None:
        """Add the gradients of a part of the batch to those of the parts before; what callbacks left is dropped."""
        self._gradients.add(part, losses, self._counter.update)

    def complete_gradients(self, word: UpdateWord) -> bool:
        """Complete the gradients after the last part of this rank, and return whether the step may follow.

        Not if the update is skipped, on which all ranks agree.

        Args:
            word: What this rank has to say to the others; then what all of them have said.

        Raises:
            LossError: A loss is not finite, and that is an error.
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        bad_loss = self._gradients.finish(word, self._loss_check.bad_loss, self._writer.has_logged)
        if self._loss_check.must_skip(bad_loss, self._counter.update):
            return False
        self._optimizer_step.settle_turn(self._counter.update)
        if self._gradients.has_logged:
            self._writer.flush()
        return True

    def start_again(self) -> None:
        """Prepare for another evaluation of the batch."""
        self.roll_back()
        self._optimizer_step.forget_gradients()
        self._gradients.start_again()

    def unscale_gradients(self) -> None:
        """Divide the gradients by the factor that keeps small ones in float16, unless that is done."""
        self._optimizer_step.unscale(self._counter.update)

    def step(self, again: Evaluation | None = None) -> None:
        """Update the weights, drop the gradients, and advance the schedules.

        Args:
            again: Evaluates the batch for optimizers whose step asks for it.
        """
        try:
            self._optimizer_step.step(self._counter.update, again, self._loss_check.skips_updates)
        except SkippedEvaluation:
            self.skip()
        else:
            self._loss_check.skips = 0

    def skip(self) -> None:
        """Drop the gradients, and restore what the update has changed; only the schedules advance."""
        self.must_skip = False
        self.roll_back()
        self._writer.discard()
        self._optimizer_step.skip(self._counter.update)
        self._loss_check.skips += 1
