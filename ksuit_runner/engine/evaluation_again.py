"""Evaluating the loss of an update's batch again, for optimizers whose step asks for it."""

from collections.abc import Sequence

from torch import Tensor

from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.engine.run import Run
from ksuit_runner.trainer.optimizer_step import SkippedEvaluation
from ksuit_runner.trainer.parts import WeighedPart


class EvaluationAgain:
    """Evaluates the loss of a batch and its gradients once more, with the weights as they are then.

    Each evaluation draws the same random numbers, and starts with the buffers and the extra state from before the
    update; what the last evaluation makes of them stays. Hooks are called only for the first evaluation, which the loop
    does itself.

    Args:
        run: The run, which has just computed the gradients of the batch.
        parts: The parts of the batch that are this rank's.

    Attributes:
        known: The loss of the batch in the evaluation of the loop.
    """

    def __init__(self, run: Run, parts: Sequence[WeighedPart]) -> None:
        self._run, self._parts, self._count = run, parts, 0
        self.known = run.trainer.total_loss

    def __call__(self) -> Tensor:
        """Return the loss, a scalar, and leave its gradients at the parameters.

        Raises:
            LossError: It is not finite, and that is an error.
            SkippedEvaluation: It is not finite, and such updates are skipped.
        """
        trainer, update, seeds = self._run.trainer, self._run.trainer.update, self._run.seeds
        seeds.note_draws()
        update.start_again()
        for part in self._parts:
            trainer.modes.train()
            seeds.seed(part.number)
            losses, _ = update.forward(part, logs=False)
            if not update.leaves_out(losses, part):
                update.backward(losses, part)
        if not update.complete_gradients(UpdateWord()):
            raise SkippedEvaluation
        trainer.modes.evaluate()
        self._count += 1
        seeds.seed_optimizer(self._count)
        return trainer.total_loss
