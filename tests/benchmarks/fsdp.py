"""What an update of two ranks with sharded parameters costs, beside FSDP2 in a loop by hand."""

from functools import partial
from pathlib import Path

from . import hand_ranks
from .ddp import GPT, TINY, by_hand, by_runner
from .hand_ranks import RankTask
from .measure import Scale, compete
from .result import Result

HAND, RUNNER = "fully_shard by hand, fused AdamW", "this runner, all defaults and EMA"


def measure(scale: Scale, folder: Path) -> Result:
    result = Result("Update of two ranks with strategy=fsdp, a gpt of 10.7 M parameters (gloo, one thread each)")
    task = scale.pick(RankTask(GPT, 8, 12), RankTask(TINY, 8, 2))
    contestants = {
        HAND: partial(by_hand, hand_ranks.fsdp, task),
        RUNNER: partial(by_runner, folder, "fsdp", task),
    }
    contest = compete(contestants, scale.turns(7))
    result.add_contest(contest, "ms")
    result.aim("runner / by hand", contest.ratio(RUNNER, HAND), 1.05)
    return result
