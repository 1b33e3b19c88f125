"""Weights that a config names: the trained ones, or others that are evaluated beside them."""

from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.models.base import ModelBase
from ksuit_runner.trainer.sgd import SgdTrainer


def model_with(weights: str, trainer: SgdTrainer, path: str) -> ModelBase:
    """Return the model with the weights of a name.

    Args:
        weights: ``model`` for the trained ones, or the name under which others are evaluated, such as ``ema``.
        trainer: Trainer of the run, to which all callbacks have offered theirs: before training, and later.
        path: Config path of the name, for errors.

    Raises:
        ConfigError: There are no such weights.
    """
    offered = {name or "model": model for name, model in trainer.evaluation_models.items()}
    if weights not in offered:
        raise ConfigError(f"there are no weights '{weights}'. {did_you_mean(weights, offered)}", path=path)
    model = offered[weights]
    assert isinstance(model, ModelBase)
    return model
