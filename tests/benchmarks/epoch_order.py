"""The order of an epoch of 100 million samples: time to start anywhere, and memory."""

import random
import tracemalloc
from pathlib import Path
from time import perf_counter

from ksuit_runner.data.batch_plan import EpochOrder

from .measure import Scale, Spread
from .result import Result, Value

BATCH = 32


def measure(scale: Scale, folder: Path) -> Result:
    length = scale.pick(100_000_000, 1_000_000)
    result = Result(f"Order of an epoch of {length:,} samples")
    generator = random.Random(0)
    seeks = [_seek(length, generator.randrange(length)) for _ in range(scale.turns(50))]
    result.add("seek to a random batch", Spread.of(seeks), "ms")
    result.aim("seek to a random batch", Spread.of(seeks).scaled(1e3), 10.0, "ms")
    for name, size in (("long epoch", length), ("epoch of 1,437 samples, as in digits", 1_437)):
        walks = [_walk(size, scale.pick(200_000, 10_000)) for _ in range(scale.turns(7))]
        result.values.append(Value(f"{name}: per sample", Spread.of(walks).scaled(1e9), "ns"))
    for size in (length, 100 * length):
        result.notes.append(f"memory for {size:,} samples: {_memory(size) / 1e3:.0f} kB at its peak")
    return result


def _seek(length: int, position: int) -> float:
    start = perf_counter()
    EpochOrder(0, 1, length).part(position, position + BATCH)
    return perf_counter() - start


def _walk(length: int, samples: int) -> float:
    """Go through one epoch after another, batch by batch; return seconds per sample."""
    start, done, epoch = perf_counter(), 0, 0
    while done < samples:
        epoch += 1
        order = EpochOrder(0, epoch, length)
        for position in range(0, min(length, samples - done), BATCH):
            order.part(position, position + BATCH)
        done += min(length, samples - done)
    return (perf_counter() - start) / samples


def _memory(length: int) -> int:
    tracemalloc.start()
    try:
        order = EpochOrder(0, 1, length)
        for position in (0, length // 2, length - BATCH):
            order.part(position, position + BATCH)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
