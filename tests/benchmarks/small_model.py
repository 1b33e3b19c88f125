"""What an update costs where the model costs next to nothing, beside hand-written loops and other trainers."""

import io
import logging
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path

from . import hand_loops
from .driver import Driven, drive
from .machine import is_installed
from .measure import Contest, Scale, Spread, compete
from .result import Result
from .small_task import BATCH_SIZE, LOG_EVERY, SmallTask

OVERRIDES = (
    *("model=mlp", "model.hidden_dims=[128]", f"data.batch_size={BATCH_SIZE}", "trainer.clip_norm=null"),
    *("callbacks=[ema,accuracy]", f"default_callbacks.train_loss.every_n_updates={LOG_EVERY}"),
    f"default_callbacks.learning_rate.every_n_updates={LOG_EVERY}",
)
"""The features of the others; all other defaults are on: progress, throughput, memory, journal, durable checkpoints."""

PEERS = {"Lightning": ("lightning", 0.15), "Trainer": ("transformers", 0.14), "Ignite": ("ignite", None)}
PACKAGES = {"lightning": "lightning", "transformers": "transformers", "ignite": "pytorch-ignite"}
A, B, C, D = "a: floor by hand", "b: plain loop by hand", "c: equipped loop by hand", "d: this runner"
C_FUSED = "c with fused AdamW"


def measure(scale: Scale, folder: Path) -> Result:
    result = Result("Update of a small model (perceptron 64-128-10 on digits, batches of 32, one thread)")
    task = SmallTask.make(scale.pick(40, 2), folder)
    driven: list[Driven] = []
    contestants: dict[str, Callable[[], float]] = {
        A: partial(hand_loops.floor, task),
        B: partial(hand_loops.plain, task),
        C: partial(hand_loops.equipped, task),
        C_FUSED: partial(hand_loops.equipped, task, fused=True),
        D: partial(_runner, task, driven),
    }
    contestants |= _peers(task, result)
    rounds = scale.turns(7)
    contest = _quietly(contestants, rounds)
    result.add_contest(contest, "us")
    result.add(f"{D}, closing included", Spread.of([one.per_update_closed for one in driven[-rounds:]]), "us")
    _compare(result, contest)
    return result


def _runner(task: SmallTask, driven: list[Driven]) -> float:
    driven.append(drive(task.folder / "runner", *OVERRIDES, f"trainer.max_epochs={task.epochs}"))
    return driven[-1].per_update


def _peers(task: SmallTask, result: Result) -> dict[str, Callable[[], float]]:
    found = {}
    for name, (module, _) in PEERS.items():
        if is_installed(PACKAGES[module]):
            found[name] = partial(import_module(f".peer_{module}", __package__).train, task)
        else:
            result.notes.append(f"{name} is skipped: {PACKAGES[module]} is not installed (pip install --group bench)")
    return found


def _quietly(contestants: dict[str, Callable[[], float]], rounds: int) -> Contest:
    """Send their progress bars to where nobody has to look at them."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return compete(contestants, rounds)
    finally:
        logging.disable(logging.NOTSET)


def _compare(result: Result, contest: Contest) -> None:
    for name, other, limit in (("c", C, 0.35), ("b", B, 0.75), ("a", A, 1.6)):
        result.aim(f"(d) / ({name})", contest.ratio(D, other), limit)
    for name, (_, peer_limit) in PEERS.items():
        if name in contest.costs and peer_limit is not None:
            result.aim(f"(d) / {name}", contest.ratio(D, name), peer_limit)
        elif name in contest.costs:
            result.notes.append(f"(d) / {name}: {contest.ratio(D, name).median:.2f}")
    result.notes.append(f"(d) / ({C_FUSED}): {contest.ratio(D, C_FUSED).median:.2f}")
