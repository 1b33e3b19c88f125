"""When everything happens: the order of an update, its hooks, the log flush and the checkpoint."""

from dataclasses import dataclass, field
from threading import Event
from typing import Any

from ksuit_runner.checkpoint import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.container import DataContainer
from ksuit_runner.errors import ResumeError
from ksuit_runner.hooks import Hooks
from ksuit_runner.interruption import Interruption
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.random_keys import mix, seed_all
from ksuit_runner.trainer import SgdTrainer


@dataclass
class Run:
    """What the loop works with.

    Attributes:
        taken_over: Set when another process has taken the run over.
        is_resumed: Whether training goes on in the middle; what is logged at the start has then been logged before.
        at_boundary: Whether the state is that of the counter's position, with no update half done.
    """

    trainer: SgdTrainer
    data: DataContainer
    hooks: Hooks
    log_writer: LogWriter
    checkpoint_writer: CheckpointWriter
    interruption: Interruption
    seed: int
    taken_over: Event = field(default_factory=Event)
    is_resumed: bool = False
    rank: int = 0
    at_boundary: bool = field(default=False, init=False)

    @property
    def counter(self) -> UpdateCounter:
        """Position of the run."""
        return self.trainer.counter


def train(run: Run) -> None:
    """Train until the end, StopTraining or a signal, and leave a checkpoint.

    Raises:
        Exception: What an update or a callback raised. If it came between two updates, a checkpoint is written first;
            in the middle of one there is no state that a resumed run could go on from exactly.
    """
    try:
        _train(run)
    except Exception as error:
        run.hooks.fire("on_exception", error=error)
        if run.at_boundary:
            save_checkpoint(run, wait=True)
        raise


def _train(run: Run) -> None:
    counter, hooks = run.counter, run.hooks
    run.data.open(counter, hooks.evaluations())
    hooks.fire("before_training", update_counter=counter)
    if run.is_resumed:
        run.log_writer.discard()
    flush_log(run)
    while not counter.is_finished and run.interruption.signal is None:
        if run.taken_over.is_set():
            raise ResumeError("another process goes on with this run; it ends here, and leaves the record to that one")
        run.at_boundary = True
        batch = run.trainer.to_device(run.data.next_training_batch())
        run.at_boundary = False
        do_update(run, batch)
        hooks.fire_after_update(counter.is_full_epoch)
        flush_log(run)
        if run.checkpoint_writer.is_due(counter) and not counter.is_finished:
            save_checkpoint(run)
    if counter.is_finished:
        hooks.fire("after_training", update_counter=counter)
        flush_log(run)
    save_checkpoint(run, wait=True)


def evaluate(run: Run) -> None:
    """Evaluate what the callbacks evaluate, once, at the position where the run stands."""
    run.hooks.fire_evaluations()
    flush_log(run)


def do_update(run: Run, batch: Any) -> None:
    """Do one update: all accumulation steps, then the optimizer's step."""
    trainer, counter, fire = run.trainer, run.counter, run.hooks.fire
    if run.hooks.has("before_every_update", "before_every_accumulation_step"):
        # What these hooks draw may change the batch, and must not depend on where the batch was fetched.
        seed_all(mix(run.seed, "hooks", counter.update, run.rank))
    fire("before_every_update", update_counter=counter)
    for step, (part, share) in enumerate(trainer.split(batch)):
        fire("before_every_accumulation_step", update_counter=counter, batch=part)
        # From here on every random draw of this step depends on its position only, whatever was drawn before.
        seed_all(mix(run.seed, "update", counter.update, step, run.rank))
        losses, outputs = trainer.forward(part)
        fire("before_every_backward", update_counter=counter, losses=losses)
        trainer.backward(losses, share)
        losses = {name: loss.detach() for name, loss in losses.items()}
        fire("track_after_accumulation_step", update_counter=counter, batch=part, losses=losses, outputs=outputs)
    trainer.step()
    counter.update += 1


def flush_log(run: Run) -> None:
    """Write what was logged at this update, and let callbacks react to it."""
    metrics = run.log_writer.flush()
    if metrics:
        run.hooks.fire("after_log", update_counter=run.counter, metrics=metrics)


def save_checkpoint(run: Run, wait: bool = False) -> None:
    """Take a checkpoint of everything, after all metrics up to it are on the disk."""
    run.log_writer.sync()
    state = {"trainer": run.trainer.state_dict(), "callbacks": run.hooks.state_dict()}
    run.checkpoint_writer.save(run.counter, run.trainer.model.tensors(), state, wait=wait)
