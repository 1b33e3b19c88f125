"""Evaluating the loss of an update's batch again, for optimizers whose step asks for it."""

from collections.abc import Sequence

from torch import Tensor

from ksuit_runner.engine.run import Run
from ksuit_runner.trainer.batch import Part
from ksuit_runner.trainer.gradient_sums import TotalLoss
from ksuit_runner.trainer.optimizers import SkippedEvaluation


class EvaluationAgain:
    """Evaluates the loss of a batch and its gradients once more, with the weights as they are then.

    Each evaluation draws the same random numbers, and starts with the buffers and the extra state from before the
    update: those of the last evaluation stay. Hooks are called for the first one only, which the loop does itself.

    Args:
        run: The run.
        parts: The parts of the batch.

    Attributes:
        total: The loss of the batch in the evaluation of the loop.
    """

    def __init__(self, run: Run, parts: Sequence[Part]) -> None:
        self._run, self._parts = run, parts
        self.total = TotalLoss(len(parts))

    def __call__(self) -> Tensor:
        """Return the loss, a scalar, and leave its gradients at the parameters.

        Raises:
            LossError: It is not finite, and that is an error.
            SkippedEvaluation: It is not finite, and such updates are skipped.
        """
        trainer, total = self._run.trainer, TotalLoss(len(self._parts))
        trainer.start_again(len(self._parts))
        for step, (part, share) in enumerate(self._parts):
            trainer.modes.train()
            self._run.seed_step(step)
            losses, _ = trainer.forward(part)
            if trainer.must_skip(losses, share):
                raise SkippedEvaluation
            trainer.backward(losses, share)
            losses.detach_()
            total.add(losses, share)
        if not trainer.complete_gradients():
            raise SkippedEvaluation
        trainer.modes.evaluate()
        return total.value()
