"""The state of a run that is resumed, forked or evaluated, from its checkpoint."""

import logging
from typing import Any

from ksuit_runner.checkpoint.base_weights import with_base
from ksuit_runner.checkpoint.format import Checkpoint
from ksuit_runner.distributed.pieces import place_all
from ksuit_runner.engine.extra_state import stored_extra_state
from ksuit_runner.engine.run import Run
from ksuit_runner.errors import CheckpointError, ResumeError
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin

_LOGGER = logging.getLogger(__name__)


def restore(run: Run, checkpoint: Checkpoint, origin: Origin, strict: bool) -> None:
    """Load a checkpoint into a run that was just built, and let go of the checkpoint's files.

    Args:
        run: The run.
        checkpoint: The checkpoint.
        origin: The stored run that it belongs to, and what was changed since.
        strict: Whether callbacks and trainer have to be those whose states it holds.

    Raises:
        ResumeError: It belongs to other callbacks, another trainer or another model.
        CheckpointError: It is damaged, or was removed meanwhile.
    """
    try:
        _restore(run, checkpoint, origin, strict)
    except CheckpointError as error:  # callbacks read files of their own, long after the others were read
        if checkpoint.paths.checkpoint_dir.exists():
            raise
        gone = f"checkpoint {checkpoint.progress} of run {origin.run_id} was removed while it was read"
        raise CheckpointError(f"{gone}: that run is going on. Try again") from error
    if checkpoint.hold is not None:
        checkpoint.hold.release()


def _restore(run: Run, checkpoint: Checkpoint, origin: Origin, strict: bool) -> None:
    may_lack = not strict or origin.mode == Mode.EVALUATE
    state = _trainer_state(run, checkpoint, origin, strict)
    weights = with_base(checkpoint.model, checkpoint.base, run.trainer.model.tensors(), run.world)
    try:
        run.trainer.model.load(weights, state["arrangements"].get("model"))
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ResumeError(f"the checkpoint's weights do not fit. {reason}", path="model") from error
    try:
        run.trainer.load_state_dict(state, origin.has_same_optimizer)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"the checkpoint's state does not fit. {reason}", path="trainer") from error
    run.hooks.states.resume(checkpoint, run.trainer.model, not strict, may_lack, run.world)
    if origin.mode == Mode.RESUME:
        run.checkpoint_writer.restore_tags(str(checkpoint.progress), checkpoint.tags)
    elif origin.mode == Mode.FORK:
        for tag in checkpoint.tags:  # what is the best checkpoint so far is so in the fork as well
            run.checkpoint_writer.request(tag)
    run.unfinished = checkpoint.state["unfinished"]
    run.seeds.draws_on_host = checkpoint.state.get("draws_on_host", True)  # earlier versions seeded for every update
    if origin.has_new_end or origin.changes_all(run.trainer.counter.stopped_by):
        run.trainer.counter.stopped = False
    if origin.has_new_end:
        run.trainer.optimizers.follow_new_length()


def _trainer_state(run: Run, checkpoint: Checkpoint, origin: Origin, strict: bool) -> dict[str, Any]:
    """Return what the trainer is to load: without what belongs to a model or a loss that was replaced."""
    stored = checkpoint.state["trainer"].items()  # optimizers place their tensors where they know the parameters
    state = {key: value if key.startswith("optimizer") else place_all(value) for key, value in stored}
    state["arrangements"] = arrangements = dict(state.get("arrangements", {}))
    if origin.has_other_model:  # its memory layout is its own
        arrangements.pop("model", None)
    elif "trainer.channels_last" in origin.changes and "model" in arrangements:
        arrangements["model"] = {**arrangements["model"], "strides": run.trainer.model.arrangement()["strides"]}
    if origin.has_other_loss:
        state.pop("loss", None)
    if _takes_extra_state(run, "extra" in state, origin, strict):
        may_lack = not strict or origin.mode == Mode.EVALUATE
        state["extra"] = place_all(stored_extra_state(checkpoint, run.trainer, run.world, may_lack))
    return state


def _takes_extra_state(run: Run, is_stored: bool, origin: Origin, strict: bool) -> bool:
    """Return whether an ``extra_state`` is restored: where the checkpoint has one, and the trainer as well.

    Raises:
        ResumeError: Only one of them has it, and that is not allowed.
    """
    is_carried = run.trainer.has_extra_state
    if is_carried is is_stored:
        return is_stored
    if strict and not (is_stored and origin.mode == Mode.EVALUATE):
        which = "with an extra_state, which this one lacks" if is_stored else "without the extra_state of this one"
        raise ResumeError(
            f"the checkpoint is that of a trainer {which}. Take that trainer, or allow the difference with "
            "resume_strict=false",
            path="trainer._target_",
        )
    if not strict and run.world.records:
        what = "is left out" if is_stored else "starts anew"
        _LOGGER.warning("resume_strict=false: the extra_state of the trainer %s", what)
    return False
