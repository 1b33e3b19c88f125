"""The model of a stored run with the weights of a checkpoint, as the run's evaluations have seen them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ksuit_runner.checkpoint.folders import weights_file
from ksuit_runner.checkpoint.format import Checkpoint, read_weights
from ksuit_runner.config.factory import Factory
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.pieces import whole
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.assembly import build_trainer, optimizers_of
from ksuit_runner.engine.initialize import base_of
from ksuit_runner.errors import CheckpointError, ConfigError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.record.stored_run import read_shapes
from ksuit_runner.schedule import constant
from ksuit_runner.system.signals import Interruption
from ksuit_runner.trainer.optimizer_needs import switches_weights
from ksuit_runner.trainer.optimizer_specs import ONLY, OptimizerSpec, SharedSettings
from ksuit_runner.trainer.optimizers import build_optimizers
from ksuit_runner.trainer.sgd import SgdTrainer

TRAINED = "model"
"""Name of the weights that are trained, and of their file; what an empty name means, too."""


def stored_trainer(
    factory: Factory, config: Mapping[str, Any], checkpoint: Checkpoint, weights: str | None
) -> SgdTrainer:
    """Build data, model and trainer of a stored run, on one process, with stored weights in place for evaluation.

    Args:
        factory: Factory over the config of the run.
        config: The same config as plain values.
        checkpoint: Checkpoint of the run.
        weights: Name of its weights; None for the trained ones.

    Raises:
        ConfigError: There are no such weights, or an object does not fit its config.
        CheckpointError: The weights do not fit the model.
    """
    shapes = read_shapes(checkpoint.paths)  # of the data that it was trained on
    trainer = build_trainer(factory, int(config["seed"]), Interruption(), Strategy(World()), shapes)
    load_evaluated(trainer.model, factory, config, checkpoint, weights)
    trainer.model.eval()
    return trainer


def inputs_and_targets(trainer: SgdTrainer, batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch, of which the latter are None for a dataset without labels.

    A tensor or a mapping that a trainer has no ``inputs_and_targets`` of its own for is the inputs, and so is the only
    item of a tuple.

    Raises:
        ConfigError: The trainer asks for targets, and there are none.
    """
    is_own = type(trainer).inputs_and_targets is not SgdTrainer.inputs_and_targets
    if not is_own and isinstance(batch, (Tensor, Mapping)):
        return batch, None
    if not is_own and isinstance(batch, (list, tuple)) and len(batch) == 1:
        return batch[0], None
    try:
        return trainer.inputs_and_targets(batch)
    except (LookupError, AttributeError) as error:
        where = f"{type(trainer).__name__}.inputs_and_targets"
        lacking = f"{where} asks a batch for what it lacks: {error}"
        raise ConfigError(f"{lacking}. For data without labels, return None as the targets", path="data") from error


def load_evaluated(
    model: ModelBase, factory: Factory, config: Mapping[str, Any], checkpoint: Checkpoint, weights: str | None
) -> None:
    """Load the weights of a checkpoint into a model, as the run's evaluations have seen them.

    A checkpoint has the weights that the run goes on with. Those that evaluations see are the same, unless the
    optimizer evaluates others, such as the mean of schedule-free ones (Defazio et al., 2024,
    https://arxiv.org/abs/2405.15682): it then gets its stored state, and switches to them.

    Args:
        model: The model of the run.
        factory: Factory over the config of the run.
        config: The same config as plain values.
        checkpoint: The checkpoint.
        weights: Name of other weights, such as ``ema``; None or ``model`` for the trained ones.

    Raises:
        ConfigError: There are no such weights.
        CheckpointError: They do not fit the model.
    """
    values = {**base_of(checkpoint, config, model), **checkpoint.model}
    is_trained = weights in (None, "", TRAINED)
    if not is_trained:
        file = weights_file(checkpoint.paths.checkpoint_dir, str(weights))
        values |= {name: whole(value) for name, value in read_weights(file.parent, file.stem).items()}
    state = checkpoint.state["trainer"]
    try:
        model.load(values, state.get("arrangements", {}).get("model"))
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(f"the checkpoint's weights do not fit. {reason}", path="model") from error
    if is_trained and evaluates_others(factory):
        _switch(model, factory, config, state)


def evaluates_others(factory: Factory) -> bool:
    """Whether an optimizer of a run evaluates other weights than it trains: the model's file has only the latter."""
    builders: list[Any] = [spec.build for spec in _specs(factory).values()]
    return any(switches_weights(getattr(build, "func", build)) for build in builders)


def _specs(factory: Factory) -> Mapping[str, OptimizerSpec]:
    found = optimizers_of(factory)
    return found if isinstance(found, Mapping) else {ONLY: OptimizerSpec(found)}


def _switch(model: ModelBase, factory: Factory, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    optimizers = build_optimizers(
        _specs(factory),
        SharedSettings(constant, rules=config["trainer"].get("parameter_rules")),
        model,
        factory.build("loss", nn.Module).to(model.device),
        UpdateCounter(1, 1, max_updates=1),
    )
    optimizers.evaluate_stored(state)
