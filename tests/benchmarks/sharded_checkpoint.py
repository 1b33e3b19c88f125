"""How long two ranks wait for a checkpoint of sharded state, beside a copy of a rank's shard in memory."""

from pathlib import Path
from time import perf_counter

import torch
from ranks import on_ranks
from torch import Tensor

from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.pieces import Piece
from ksuit_runner.distributed.world import World
from ksuit_runner.paths import PathProvider

from .measure import Contest, Scale
from .result import Result

SIZE, LAYERS = 2, 24
STALL, COPY, TOTAL = "stall per checkpoint", "copy of a shard in memory", "until it is on the disk"


def measure(scale: Scale, folder: Path) -> Result:
    size = scale.pick(304_000_000, 300_000)
    result = Result(f"Stall of training per checkpoint of two ranks, sharded state of {size / 1e6:.0f} MB")
    found = on_ranks(SIZE, _on_rank, folder, size // SIZE, scale.turns(7), timeout_s=600.0)
    # Ranks wait for each other in their next update: the slowest decides.
    slowest = {name: [max(costs) for costs in zip(*(costs[name] for costs in found), strict=True)] for name in found[0]}
    contest = Contest(slowest)
    result.add_contest(contest, "ms")
    result.aim("stall / copy of a shard", contest.ratio(STALL, COPY), 1.2)
    return result


def _on_rank(folder: Path, size: int, turns: int) -> dict[str, list[float]]:
    world = connect({})
    writer = CheckpointWriter(PathProvider(folder, "run00000"), world=world)
    counter = UpdateCounter(1, 1, max_updates=1000)
    length = size // (LAYERS * 3 * 4)
    shard = {f"layer{i}.{part}": torch.randn(length) for i in range(LAYERS) for part in ("w", "m1", "m2")}
    buffer = {name: torch.empty_like(tensor) for name, tensor in shard.items()}
    costs: dict[str, list[float]] = {name: [] for name in (STALL, COPY, TOTAL)}
    for turn in range(turns + 1):  # the first one takes the buffers
        world.gather(turn)
        start = perf_counter()
        for name, tensor in shard.items():
            buffer[name].copy_(tensor)
        copied = perf_counter() - start
        world.gather(turn)
        counter.update += 1
        start = perf_counter()
        _save(writer, counter, shard, world)
        stall = perf_counter() - start
        writer.wait()
        for name, cost in ((COPY, copied), (STALL, stall), (TOTAL, perf_counter() - start)):
            costs[name] += [cost] if turn else []
    writer.close()
    world.close()
    return costs


def _save(writer: CheckpointWriter, counter: UpdateCounter, shard: dict[str, Tensor], world: World) -> None:
    """Take a checkpoint, a third of it as the model and the rest as the optimizer's state, as in a run."""
    pieces = {
        name: Piece(tensor, (world.rank * len(tensor),), (world.size * len(tensor),)) for name, tensor in shard.items()
    }
    model = {name: piece for name, piece in pieces.items() if name.endswith("w")}
    others = {name: piece for name, piece in pieces.items() if not name.endswith("w")}
    writer.save(counter, model, {"trainer": {"optimizer": others}, "callbacks": {}})
