"""What an update of two ranks costs, beside torch's DistributedDataParallel in a loop by hand."""

from functools import partial
from pathlib import Path

from ranks import ksuit_on_ranks, on_ranks

from . import hand_ranks
from .clock import bare_seconds
from .driver import CLOCK
from .hand_ranks import RankTask
from .measure import Scale, compete
from .result import Result

SIZE = 2
GPT = {"embed_dim": 384, "depth": 6, "num_heads": 6}
TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def measure(scale: Scale, folder: Path) -> Result:
    result = Result("Update of two ranks with strategy=ddp (gloo, one thread each)")
    tasks = {"perceptron 64-128-10, batches of 64": RankTask(None, 64, scale.pick(400, 4))}
    if not scale.is_tiny:
        tasks["gpt of 10.7 M, batches of 8 x 64"] = RankTask(GPT, 8, 12)
    for name, task in tasks.items():
        hand, runner = f"{name}: DistributedDataParallel by hand", f"{name}: this runner, all defaults and EMA"
        contestants = {
            hand: partial(by_hand, hand_ranks.ddp, task),
            runner: partial(by_runner, folder, "ddp", task),
        }
        contest = compete(contestants, scale.turns(7))
        result.add_contest(contest, "ms")
        result.aim(f"{name}: runner / by hand", contest.ratio(runner, hand), 1.03)
    return result


def by_hand(loop: object, task: RankTask) -> float:
    """Let the ranks train by hand; return seconds per update of the slowest."""
    return max(on_ranks(SIZE, loop, task, timeout_s=600.0))


def by_runner(folder: Path, strategy: str, task: RankTask) -> float:
    """Let the ranks train the same with the runner; return seconds per update."""
    ksuit_on_ranks(folder, SIZE, f"strategy={strategy}", "tracker=noop", *task.overrides, CLOCK)
    return bare_seconds(folder)
