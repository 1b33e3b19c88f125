"""The weights of a checkpoint as evaluations at its update saw them, beside a run that goes on with its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from torch import nn

from ksuit_runner.checkpoint.base_weights import with_base
from ksuit_runner.checkpoint.format import Checkpoint, read_weights
from ksuit_runner.checkpoint.state_types import copy_state
from ksuit_runner.models.base import ModelBase
from ksuit_runner.trainer.sgd import SgdTrainer


@contextmanager
def weights_at(trainer: SgdTrainer, checkpoint: Checkpoint) -> Iterator[dict[str, nn.Module]]:
    """Provide models with the weights of a checkpoint, and its loss and extra state, while the block runs.

    Nothing of the run is changed: the models are copies, in evaluation mode. Optimizers that evaluate other weights
    than they train provide those.

    Args:
        trainer: Trainer of the run.
        checkpoint: A checkpoint of this run.

    Yields:
        The models by the name of their weights: the trained ones have the empty name, others those under which
        callbacks offer them for evaluation, if they write them to a file of that name.
    """
    state = checkpoint.state["trainer"]
    arrangements = state.get("arrangements", {})
    model, loss, optimizers = trainer.model.copy(), deepcopy(trainer.loss), None
    if any(member.switches_weights for member in trainer.optimizers.members.values()):
        model, loss, optimizers = deepcopy((trainer.model, trainer.loss, trainer.optimizers))
    weights = with_base(checkpoint.model, checkpoint.base, trainer.model.tensors(), trainer.strategy.world)
    for copy, tensors, name in ((model, weights, "model"), (ModelBase(loss), state.get("loss"), "loss")):
        if tensors is not None:
            copy.load(tensors, arrangements.get(name))
            if name in arrangements:
                copy.arrange(arrangements[name])
        copy.eval()
    if optimizers is not None:
        optimizers.evaluate_stored(state)
    models: dict[str, nn.Module] = {"": model}
    for name, other in trainer.evaluation_models.items():
        file = checkpoint.paths.checkpoint_dir / f"{name}.safetensors"
        if name and file.is_file() and isinstance(other, ModelBase):
            models[name] = average = other.copy()
            tensors = {**average.tensors(), **weights, **read_weights(file.parent, name)}  # it has what is averaged
            average.load(tensors, average.arrangement())
    has_extra = trainer.has_extra_state and "extra" in state
    kept_loss, kept_extra = trainer.loss, copy_state("trainer", trainer.extra_state()) if has_extra else None
    trainer.loss = loss
    try:
        if has_extra:
            trainer.load_extra_state(state["extra"])
        yield models
    finally:
        trainer.loss = kept_loss
        if has_extra:
            trainer.load_extra_state(kept_extra)
