"""The state after the last full update, saved once an error or a signal has ended a run: by all ranks, or by none."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from ksuit_runner.engine.run import HALF_DONE, Phase, Run, save_checkpoint
from ksuit_runner.errors import Interrupted, KsuitError, PeerError

_LOGGER = logging.getLogger(__name__)
_LOST = "the state after the last full update is lost: a resume continues from the last checkpoint"


class Standing(NamedTuple):
    """Where a rank stands.

    Attributes:
        update: Its last full update.
        phase: Name of its phase.
        done: The hooks that it has called in the last round.
        earliest: How many of them it cannot undo.
        has_state: Whether there is anything to save.
        is_lost: Whether its state after the last full update is lost.
        signal: The signal that has asked it to end, if any.
    """

    update: int
    phase: str
    done: list[str]
    earliest: int
    has_state: bool
    is_lost: bool
    signal: int | None


class Place(NamedTuple):
    """A place in the loop at which all ranks can stand: a phase, and how many of its hooks were called."""

    phase: Phase
    hooks: int | None = None


def save_last_full_update(run: Run, error: BaseException) -> None:
    """Save the state after the last full update, from which a failed run can resume.

    Args:
        run: The run.
        error: What it has failed with.
    """
    try:
        if stand_together(run, error):
            save_checkpoint(run, wait=True)
    except KeyboardInterrupt:
        raise
    except BaseException as another:  # it must not hide the one that ended the run
        run.meeting.again()
        if not isinstance(another, PeerError | Interrupted):
            what = another if isinstance(another, KsuitError | OSError) else repr(another)
            _LOGGER.error(
                "the last state could not be saved, a resume continues from the checkpoint before it: %s", what
            )


def stand_together(run: Run, error: BaseException) -> bool:
    """Undo what is half done of an update, so that all ranks stand at the same hook.

    Args:
        run: The run.
        error: What has ended it.

    Returns:
        Whether the state can be saved then.

    Raises:
        KsuitError: It cannot be undone; or the ranks do not come together.
    """
    if not run.meeting.after(error):
        _LOGGER.warning("a rank is lost, so that nothing is saved: a resume continues from the last checkpoint")
        return False
    standing = _stand(run)
    found = [Standing(*each) for each in run.world.exchange("where they stand", standing)]
    run.share_signal([each.signal for each in found])
    if not all(each.has_state for each in found):
        return False
    place = None if any(each.is_lost for each in found) else common_place(found)
    if place is None:
        if run.world.records:
            _LOGGER.warning(_LOST)
        return False
    run.phase = place.phase
    if place.hooks is not None and (mark := run.hooks.go_back(place.hooks)) is not None:
        run.log_writer.discard(mark)
    return True


def _stand(run: Run) -> Standing:
    """Undo what an update has changed before its step, if that is possible; callbacks go back to their snapshots."""
    states, phase = run.hooks.states, run.phase
    is_lost = phase is Phase.STEP or not states.are_whole or run.trainer.loss_check.has_failed_late
    is_lost = is_lost or (phase is Phase.BEFORE_STEP and not states.can_roll_back)
    has_state = not run.taken_over.is_set() and phase not in (Phase.START, Phase.END)
    if phase in (Phase.BEFORE_STEP, Phase.STEP):
        run.log_writer.abandon_update()
    if has_state and not is_lost and phase is Phase.BEFORE_STEP:
        run.trainer.update.roll_back()
        run.checkpoint_writer.take_requests()
        run.counter.stopped = False
        run.phase = Phase.BETWEEN
    done, signal = run.hooks.done, run.interruption.signal
    return Standing(run.counter.update, run.phase.name, done, states.earliest, has_state, is_lost, signal)


def common_place(standings: Sequence[Standing]) -> Place | None:
    """Return the last place at which all ranks have been and can stand again; None if there is none."""
    if len({each.update for each in standings}) > 1:
        return None
    halves = [each for each in standings if Phase[each.phase] in HALF_DONE]
    if not halves:
        phases = {each.phase for each in standings}
        return Place(Phase[phases.pop()]) if len(phases) == 1 else None
    least = min(halves, key=lambda each: len(each.done))
    number = len(least.done)
    for each in standings:
        is_there = each.phase in (least.phase, Phase.BETWEEN.name)
        if not is_there or each.done[:number] != least.done or each.earliest > number:
            return None
    return Place(Phase[least.phase], number)
