"""The training loop: the order of an update, its hooks, the log flush and the checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.data.fetch_batch import Part
from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.agenda import Method
from ksuit_runner.engine.evaluation_again import EvaluationAgain
from ksuit_runner.engine.forgotten_state import ForgottenState
from ksuit_runner.engine.last_state import save_last_full_update, stand_together
from ksuit_runner.engine.rehearsal import rehearse
from ksuit_runner.engine.run import Phase, Run, check_state, save_checkpoint
from ksuit_runner.errors import Interrupted, KsuitError, LossError, TakenOverError
from ksuit_runner.keyed_random import may_draw, mix, seed_all
from ksuit_runner.trainer.sgd import SgdTrainer

_MOST_ROUNDS = 100


def train(run: Run) -> None:
    """Train until the end, StopTraining or a signal, and write a checkpoint.

    Raises:
        BaseException: What an update or a callback raised. The state after the last full update is saved first, if it
            can be restored: not after an optimizer has failed in the middle of a step.
    """
    try:
        _train(run)
    except BaseException as error:  # SystemExit and the like are errors, too
        if isinstance(error, KeyboardInterrupt) and not (run.is_alone and run.interruption.signal is None):
            raise  # the second Ctrl-C: it ends at once
        is_half_done = run.phase in (Phase.BEFORE_STEP, Phase.STEP)
        error.add_note(f"raised {'in' if is_half_done else 'after'} update {run.counter.update + is_half_done}")
        save_last_full_update(run, error)
        _notify_callbacks(run, error)
        raise


def _notify_callbacks(run: Run, error: BaseException) -> None:
    """Notify the callbacks of an error; an error of theirs must not hide it."""
    try:
        run.hooks.fire("on_exception", error=error)
        if not run.taken_over.is_set():
            run.log_writer.flush()
    except BaseException as another:
        error.add_note(f"and while callbacks were notified of it: {another!r}")


def _train(run: Run) -> None:
    try:
        with _explained(run.world):
            _finish_all(run)
    except Interrupted as error:
        if not run.is_alone and not _end_together(run, error):
            return
    if run.phase is not Phase.START:
        save_checkpoint(run, wait=True)


@contextmanager
def _explained(world: World) -> Iterator[None]:
    """Raise the real cause of an error that torch has raised because another rank has left an exchange."""
    try:
        yield
    except BaseException as error:
        if (reason := world.explain(error)) is not error:
            raise reason from error
        raise


def _finish_all(run: Run) -> None:
    """Do all updates that are left, and what follows the last one."""
    counter, data = run.counter, run.data
    _start(run)
    if run.unfinished is not None:
        finish_unfinished(run, run.unfinished)
    elif counter.is_empty:
        finish_update(run)  # a run without updates does once whatever is ever due
    first, forgotten = counter.update + 1, None  # in which the optimizer creates its state
    while not counter.is_finished and not run.must_end:
        if run.taken_over.is_set():
            raise TakenOverError("another process has taken over this run; it ends here, and leaves its record alone")
        do_update(run, _on_device(run, data.next_training_batch()))
        if counter.update == first and run.world.records:
            forgotten = ForgottenState(run.trainer)
        elif counter.update == first + 1 and forgotten is not None:
            forgotten.warn()  # before evaluations, which may leave other values
        finish_update(run)
        if counter.update == first:
            check_state(run)
    if counter.is_finished and run.phase is Phase.BETWEEN:
        finish_training(run)


def _end_together(run: Run, error: Interrupted) -> bool:
    """Have all ranks end where one was interrupted while it waited for data; return whether the state can be saved."""
    run.share_signal([error.number])
    return stand_together(run, error)


def _start(run: Run) -> None:
    hooks, counter = run.hooks, run.counter
    parts, in_step = run.trainer.accumulation_steps, run.trainer.strategy.is_sharded
    run.data.open(counter, hooks.evaluations(), parts, in_step=in_step)
    run.trainer.modes.start()
    run.trainer.modes.evaluate()
    with run.tracker.together():
        hooks.fire("before_training", update_counter=counter)
    run.trainer.check_parameters()
    run.trainer.modes.find_modules()
    new = [item for name, item in hooks.callbacks.items() if name not in hooks.states.begun]
    evaluations = [item for item in new if isinstance(item, DatasetCallback) and item.shares_work]
    rehearse(evaluations, run.trainer, {"": run.trainer.model})
    run.log_writer.discard_of(hooks.states.begun)
    hooks.may_have_said = True
    _log(run)
    at_start = hooks.agenda.at_start(hooks.states.begun)
    check_state(run)
    run.when_accepted()
    hooks.states.begun = set(hooks.callbacks)
    run.phase = Phase.BETWEEN
    if at_start:
        begin_training(run, at_start)
    if run.checkpoint_writer.is_requested and not counter.is_empty:  # by a callback, for the weights before training
        save_checkpoint(run)


def evaluate(run: Run) -> None:
    """Run the evaluations of all callbacks once, at the current position of the run.

    Raises:
        Interrupted: A signal asked the run to end.
    """
    run.hooks.fire_evaluations()
    run.hooks.may_have_said = True
    _log(run)


def do_update(run: Run, batch: Sequence[Part]) -> None:
    """Do one update: the accumulation steps of this rank, then the optimizer's step.

    Args:
        run: The run.
        batch: This rank's parts of the batch, on the device.
    """
    trainer, update, counter, fire = run.trainer, run.trainer.update, run.counter, run.hooks.fire
    run.hooks.states.snapshot_early()
    trainer.modes.train()
    update.take_snapshot()
    run.phase = Phase.BEFORE_STEP
    run.log_writer.is_ahead = True
    if trainer.freezing is not None:
        trainer.freezing.follow(counter.update)
    fire("before_every_update", update_counter=counter)
    if may_draw(trainer.start_update):
        seed_all(mix(run.seed, "start_update", counter.update))
    parts = trainer.start_update(batch)
    counter.accumulation_steps = trainer.accumulation_steps
    for part in parts:
        step = counter.accumulation_step = part.number
        fire("before_every_accumulation_step", step, update_counter=counter, batch=part.batch)
        run.seeds.seed(step)  # so that it does not matter what hooks have drawn
        losses, outputs = update.forward(part)
        if update.leaves_out(losses, part):
            continue
        fire("before_every_backward", step, update_counter=counter, losses=losses)
        update.backward(losses, part)
        trainer.modes.evaluate()
        losses.detach_()
        if trainer.running_losses.are_wanted:
            trainer.running_losses.note(step, losses, trainer.part_weight(part.batch))
        fire = run.hooks.fire_between
        fire(
            "track_after_accumulation_step",
            step,
            update_counter=counter,
            batch=part.batch,
            losses=losses,
            outputs=outputs,
        )
        if part is not parts[-1]:
            trainer.modes.train()
    word = UpdateWord() if run.is_alone else run.word()
    is_complete = update.complete_gradients(word)
    if not run.is_alone:
        run.hear(word)
    if is_complete and run.hooks.methods("before_every_optimizer_step"):
        update.unscale_gradients()
        run.hooks.fire_between("before_every_optimizer_step", update_counter=counter)
        is_complete = not update.must_skip
    if is_complete:
        again = EvaluationAgain(run, parts) if trainer.optimizers.evaluate_again else None
        run.phase = Phase.STEP
        run.seeds.seed_optimizer()
        trainer.step(again)
    else:
        update.skip()
    trainer.running_losses.add()
    run.seeds.end_update()
    counter.update += 1
    run.has_begun = True
    run.log_writer.is_ahead = False


def _on_device(run: Run, batch: Sequence[Part]) -> Sequence[Part]:
    """Move the parts of a batch to the device; the generators are seeded for a trainer whose ``to_device`` may draw."""
    trainer, moved = run.trainer, []
    draws = may_draw(trainer.to_device)
    if trainer.device.type == "cpu" and type(trainer).to_device is SgdTrainer.to_device:
        return batch
    for part in batch:
        if draws:
            number = [] if trainer.accumulation_steps == 1 else [part.number]
            seed_all(mix(run.seed, "to_device", run.counter.update, *number))
        moved.append(Part(trainer.to_device(part.batch), part.number, part.samples))
    return moved


def begin_training(run: Run, methods: Sequence[Method], skip: Sequence[str] = ()) -> None:
    """Do what comes before the first update."""
    run.phase = Phase.AT_START
    _fire_and_log(run, methods, skip)
    run.phase = Phase.BETWEEN


def finish_update(run: Run, skip: Sequence[str] = ()) -> None:
    """Do what follows an update: the hooks, periodic callbacks, the log, and a checkpoint if one is due."""
    run.phase = Phase.AFTER_UPDATE
    _fire_and_log(run, run.hooks.agenda.after_update(), skip)
    if run.counter.is_full_epoch:
        run.trainer.check_parameters()
        run.trainer.modes.find_modules()
    run.phase = Phase.BETWEEN
    run.hooks.fire_timed()
    if run.checkpoint_writer.is_due(run.counter) and not run.counter.is_finished:
        save_checkpoint(run)


def finish_training(run: Run, skip: Sequence[str] = (), phase: Phase = Phase.AT_END) -> None:
    """Do what follows the last update of the run; a run that ended between two hooks continues in the phase given."""
    if phase is Phase.AT_END:
        run.world.exchange("the end of training")  # ranks can only go back to hooks of the same round
        run.phase = Phase.AT_END
        _check_trained(run)
        _fire_and_log(run, run.hooks.agenda.at_end(), skip)
        skip = ()
    run.world.exchange("after training")
    run.phase = Phase.AFTER_TRAINING
    _fire_and_log(run, run.hooks.methods("after_training"), skip)
    run.world.exchange("all is done")
    run.phase = Phase.END


def _check_trained(run: Run) -> None:
    """Check that a run which is about to be finished has trained something.

    Raises:
        LossError: It has skipped every update.
    """
    if run.counter.is_finished and 0 < run.counter.update == run.trainer.loss_check.skips:
        raise LossError(f"every update was skipped ({run.counter.update}); nothing is learned", path="trainer.nan_loss")


def finish_unfinished(run: Run, unfinished: Mapping[str, Any]) -> None:
    """Call the remaining hooks of the last update, if the run had ended between two of them."""
    run.unfinished = None
    run.log_writer.load_state_dict(unfinished["log"])
    for tag in unfinished["requested"]:
        run.checkpoint_writer.request(tag)
    phase, done = Phase[unfinished["phase"]], unfinished["done"]
    if phase is Phase.AT_START:
        begin_training(run, run.hooks.agenda.at_start(), done)
    elif phase is Phase.AFTER_UPDATE:
        finish_update(run, done)
    else:
        finish_training(run, done, phase)


def _fire_and_log(run: Run, methods: Sequence[Method], skip: Sequence[str]) -> None:
    """Fire hooks, write what was logged at this update, and let callbacks react to it."""
    run.trainer.modes.evaluate()
    run.hooks.states.drop_snapshots()
    run.hooks.done.clear()
    run.log_writer.start_rounds()
    try:
        run.hooks.fire_round(methods, skip, update_counter=run.counter)
    finally:
        run.has_begun = run.has_begun or bool(run.hooks.done)
    _log(run, skip)


def _log(run: Run, skip: Sequence[str] = ()) -> None:
    """Write what was logged and let callbacks react to it, and to what they log in reaction, until nothing is new."""
    metrics: Mapping[str, float] = {}
    for number in range(_MOST_ROUNDS):
        metrics = run.log_writer.flush() if run.must_flush() else {}
        if not metrics:
            return
        run.trainer.loss_check.settle()
        run.trainer.observe(metrics)
        methods, label = run.hooks.methods("after_log"), f" {number}" if number else ""
        run.hooks.fire_round(methods, skip, label, update_counter=run.counter, metrics=metrics)
    raise KsuitError(f"callbacks log in reaction to each other without end, at last {', '.join(metrics)[:200]}")
