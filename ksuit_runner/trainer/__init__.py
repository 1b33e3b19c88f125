"""One update of training: batches, losses, gradients and the optimizer."""

from ksuit_runner.trainer.sgd import SgdTrainer

__all__ = ["SgdTrainer"]
