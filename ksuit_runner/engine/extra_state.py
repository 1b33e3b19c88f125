"""The state that a trainer carries from update to update, where it differs between the ranks of a run."""

from typing import Any, Final

from ksuit_runner.checkpoint.exchange import digest
from ksuit_runner.checkpoint.format import Checkpoint
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ResumeError
from ksuit_runner.trainer.sgd import SgdTrainer

EXTRA: Final = "trainer: extra_state()"
"""Its name among the states that differ between ranks; no callback can have it."""


def own_extra_state(trainer: SgdTrainer, state: Any, world: World) -> dict[str, Any]:
    """Return the state of this rank by its name, if the ranks differ in it; all ranks call it.

    Args:
        trainer: Trainer of the run.
        state: What its ``extra_state`` returned.
        world: The ranks of the run.

    Raises:
        CheckpointError: It cannot be stored.
        PeerError: A rank has failed, is lost, or does not answer in time.
    """
    if world.size == 1 or not trainer.has_extra_state or len(set(world.gather(digest(EXTRA, state)))) == 1:
        return {}
    return {EXTRA: state}


def stored_extra_state(checkpoint: Checkpoint, trainer: SgdTrainer, world: World, may_lack: bool) -> Any:
    """Return the state of this rank in a checkpoint.

    Args:
        checkpoint: One with such a state.
        trainer: Trainer of the run.
        world: The ranks of the run.
        may_lack: Whether ranks may get that of rank 0 where nobody makes one of theirs.

    Raises:
        ResumeError: It differs between ranks, of which there are more or fewer now.
    """
    states = [local[EXTRA] for local in checkpoint.local if EXTRA in local]
    if len(states) == world.size:
        return states[world.rank]
    kind = type(trainer)
    if states and kind.merge_extra_states is not SgdTrainer.merge_extra_states:
        return trainer.merge_extra_states(states)
    if states and not may_lack:
        raise ResumeError(
            f"its extra_state differs between the {len(states)} ranks that have stored it, and a {kind.__name__} has "
            f"no merge_extra_states to make one of them. Resume with ranks={len(states)}, or let all ranks take that "
            "of rank 0 with resume_strict=false",
            path="trainer._target_",
        )
    return checkpoint.state["trainer"]["extra"]
