"""What ranks find in their batches is put together as one process would have found it, bit for bit."""

import math
from itertools import chain

import pytest
import torch
from worlds import in_threads

from ksuit_runner.distributed.world import World
from ksuit_runner.errors import KsuitError
from ksuit_runner.trainer.gathered import Gathered

BATCHES = 11


def collect(gathered, world, batches):
    """Go through batches whose sums depend on their order: of sizes that differ by orders of magnitude."""
    gathered.start(is_shared=world.size > 1)
    for number in range(batches):
        if number % world.size != world.rank:
            continue
        generator = torch.Generator().manual_seed(number)
        values = torch.randn(5, generator=generator) * 10.0 ** (number % 4)
        gathered.begin(number, counts=True)
        if number >= 2:  # one that the first batches do not have
            gathered.add(("late", 1), values.sum().item(), count=0.1 * number)
        gathered.add("sum", values, count=5)
        gathered.add("hits", values > 0, count=torch.tensor(5))
        empty = number == 3
        gathered.add_mean("mean", values.mean() * (torch.nan if empty else 1), 0 if empty else 0.1 * number + 1)
        gathered.add_mean("tokens", values.bfloat16().mean(), torch.tensor(0.0 if empty else number + 0.1))
        gathered.add_rows("rows", values.repeat(number % 3, 1))
        values.zero_()  # what was added does not change with it
        gathered.begin(number, counts=False)  # repeated for other ranks only
        gathered.add("sum", torch.ones(5), count=7)
        gathered.add_mean("never", torch.ones(()), 1)
        gathered.add_rows("rows", torch.ones(1, 5))
    gathered.finish(world)
    totals = {key: (total.sum, total.count, total.mean) for key, total in gathered.totals.items()}
    return totals, dict(gathered.rows)


def on_rank(world):
    gathered = Gathered(torch.device("cpu"), torch.float64)
    found = [collect(gathered, world, batches) for batches in (BATCHES, 2)]
    gathered.start(is_shared=True)
    if world.rank == 1:  # found by nobody else
        gathered.begin(1, counts=True)
        gathered.add("only", 3)
    gathered.finish(world)
    only = dict(gathered.totals)["only"].sum
    return found, only


def same(one, other):
    """Whether totals and rows are the same to the bit, and in the same order."""
    (totals, rows), (other_totals, other_rows) = one, other
    assert list(totals) == list(other_totals) and list(rows) == list(other_rows)
    pairs = [zip(totals[key], other_totals[key], strict=True) for key in totals]
    pairs = [*chain(*pairs), *((rows[key], other_rows[key]) for key in rows)]
    return all(torch.equal(*(torch.as_tensor(value).nan_to_num(-1) for value in pair)) for pair in pairs)


def test_the_results_are_those_of_one_process():
    gathered = Gathered(torch.device("cpu"), torch.float64)
    whole = [collect(gathered, World(), batches) for batches in (BATCHES, 2)]
    assert set(whole[0][0]) == {"sum", "hits", "mean", "tokens", ("late", 1)} and "rows" in whole[0][1]
    for found, only in in_threads(3, on_rank):
        assert all(same(one, other) for one, other in zip(found, whole, strict=True)) and only == 3


def test_of_one_process_sums_means_and_rows_are_as_by_hand():
    gathered = Gathered(torch.device("cpu"), torch.float64)
    totals, rows = collect(gathered, World(), 3)
    values = [torch.randn(5, generator=torch.Generator().manual_seed(n)) * 10.0**n for n in range(3)]
    assert torch.equal(totals["sum"][0], torch.stack(values).double().cumsum(0)[-1]) and totals["sum"][1] == 15
    assert totals["hits"][0].dtype is torch.int64 and totals["hits"][0].sum() == (torch.cat(values) > 0).sum()
    assert totals["hits"][2].dtype is torch.float64
    assert torch.equal(rows["rows"], torch.stack([values[1], values[2], values[2]]))
    wanted = sum(value.mean().double() * (1 + 0.1 * n) for n, value in enumerate(values)) / 3.3
    assert totals["mean"][2] == pytest.approx(wanted.item())
    gathered.start()
    gathered.add("nothing", 0)
    gathered.add_mean("empty", torch.tensor(torch.nan), 0)
    assert all(math.isnan(total.mean) for total in gathered.totals.values())
    with pytest.raises(KsuitError, match="rows are a tensor"):
        gathered.add_rows("scalar", torch.tensor(1.0))
