"""Tests for what several ranks exchange."""

import ctypes
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, on_ranks

from ksuit_runner.distributed.connect import connect
from ksuit_runner.errors import Interrupted, PeerError


def exchange_plain() -> list[Any]:
    world = connect({"version": "1"})
    try:
        long = world.gather("x" * 5000 * world.rank)
        return [
            (world.rank, world.size, world.local_rank),
            world.gather({"rank": world.rank, "text": "ä", "none": None, "pair": (1, 2.5)}),
            [len(text) for text in long],
            world.broadcast(f"from {world.rank}"),
            world.broadcast([1] * 3000),
        ]
    finally:
        world.close()


def test_plain_values() -> None:
    for rank, (place, gathered, lengths, text, many) in enumerate(on_ranks(3, exchange_plain)):
        assert place == (rank, 3, rank)
        assert gathered == [{"rank": other, "text": "ä", "none": None, "pair": [1, 2.5]} for other in range(3)]
        assert (lengths, text, many) == ([0, 5000, 10000], "from 0", [1] * 3000)


def exchange_tensors() -> list[list[torch.Tensor]]:
    world = connect({})
    try:
        own = [torch.full((world.rank + 1, 2), world.rank, dtype=torch.bfloat16), torch.tensor(world.rank == 1)]
        return world.gather_tensors([*own, torch.empty(0, 3), torch.tensor([0.1, -0.0]).double()][: 4 - world.rank])
    finally:
        world.close()


def test_tensors_of_any_kind() -> None:
    for found in on_ranks(2, exchange_tensors):
        assert [len(tensors) for tensors in found] == [4, 3]
        for rank, tensors in enumerate(found):
            assert torch.equal(tensors[0], torch.full((rank + 1, 2), rank, dtype=torch.bfloat16))
            assert tensors[1].dtype == torch.bool and tensors[1].item() == (rank == 1)
            assert tensors[2].shape == (0, 3)
        assert torch.equal(found[0][3], torch.tensor([0.1, -0.0]).double())


def exchange_and_leave() -> None:
    world = connect({})
    world.gather(None)
    world.close()
    # A process that was forked would end without any of the cleaning up in which others abort.
    ctypes.pythonapi.Py_Exit(40 + world.rank)


def leave(times: int) -> None:
    with Ranks() as ranks:
        for _ in range(times):
            begun = ranks.start(2, exchange_and_leave)
            for rank in begun:
                rank.process.join(60)
                if rank.process.exitcode == 1:
                    rank.result()  # raises what has gone wrong there
            assert [rank.process.exitcode for rank in begun] == [40, 41]


def test_every_rank_exits_cleanly() -> None:
    leave(2)


@pytest.mark.soak
def test_every_rank_exits_cleanly_fifty_times() -> None:
    leave(50)


def lose(what: str, victim: int, limit: float) -> tuple[str, bool, float]:
    """Exchange something, lose a rank, and return how the others notice, whether they meet again, and when."""
    world = connect({}, 120.0)
    try:
        world.gather(None)
        world.timeout_s = limit
        if world.rank == victim:
            if what == "stuck":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(PeerError) as caught:
            world.read("never", 60) if what == "read" else world.gather(None)
        with pytest.raises(PeerError):
            world.gather(None)
        return str(caught.value), world.recover(), time.monotonic() - began
    finally:
        world.close()


SILENT, LIMIT_S = "rank {} does not answer, last sign of life", 8.0


@pytest.mark.slow
def test_a_lost_rank_is_named_in_bounded_time() -> None:
    kinds = {
        ("killed", 1, 3): SILENT,
        ("killed", 0, 2): SILENT,
        ("stopped", 1, 2): SILENT,
        ("stopped", 0, 2): SILENT,
        ("read", 1, 2): SILENT,
        ("stuck", 1, 2): "rank {} has not reached an exchange within 8 s",
    }
    with Ranks() as ranks:
        begun = {kind: ranks.start(kind[2], lose, kind[0], kind[1], LIMIT_S) for kind in kinds}
        for (what, victim, size), text in kinds.items():
            for rank in set(range(size)) - {victim}:
                process = begun[what, victim, size][rank]
                found, meets_again, seconds = process.result()
                assert text.format(victim) in found, (what, victim, rank, found)
                assert not meets_again and seconds < 2 * LIMIT_S, (what, victim, rank, seconds)
                process.process.join(LIMIT_S)
                assert process.process.exitcode == 0


def let_down() -> tuple[str, str]:
    """Fail while the others are in an exchange of torch's own, which looks for no notes."""
    world = connect({})
    try:
        error = ValueError("a bad sample")
        assert world.explain(error) is error
        memory = RuntimeError("no memory")
        if world.rank == 1:
            time.sleep(0.2)
            world.fail(error)
            return "", ""
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(1))
        return str(world.explain(caught.value)), str(world.explain(memory))
    finally:
        world.close()


def test_errors_of_the_exchanges_of_torch_are_explained() -> None:
    text = "rank 1 has failed: a bad sample"
    assert on_ranks(2, let_down) == [(text, "no memory"), ("", "")]


def exchange_until_resumed(folder: Path) -> int:
    world = connect({}, 120.0)
    try:
        world.timeout_s = 4.0  # so that a rank is silent after 2 s
        while not all(world.gather((folder / "resumed").exists())):
            (folder / f"ready{world.rank}").touch()
            time.sleep(0.3 * world.rank)  # rank 0 is in an exchange
        return world.rank
    finally:
        world.close()


def test_ranks_that_were_suspended_together_go_on(tmp_path: Path) -> None:
    with Ranks() as ranks:
        begun = ranks.start(2, exchange_until_resumed, tmp_path)
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        for rank in begun:
            os.kill(rank.process.pid, signal.SIGSTOP)
        time.sleep(6)
        for rank in begun:
            os.kill(rank.process.pid, signal.SIGCONT)
        (tmp_path / "resumed").touch()
        assert [rank.result() for rank in begun] == [0, 1]


def fail_amid_an_exchange() -> tuple[bool, float]:
    """Give an exchange up that the others have not begun, as a second Ctrl-C does."""
    world, began = connect({}), time.monotonic()
    try:
        if world.rank == 0:
            world.start(lambda: dist.all_reduce(torch.ones(1), async_op=True))
            world.fail(KeyboardInterrupt())
        else:
            with pytest.raises(Interrupted):
                world.gather(None)
        return world.recover(), time.monotonic() - began
    finally:
        world.close()


def test_an_exchange_can_be_given_up() -> None:
    for meets_again, seconds in on_ranks(2, fail_amid_an_exchange):
        assert meets_again and seconds < 30


def leave_amid_an_exchange() -> str:
    world = connect({})
    try:
        if world.rank == 0:
            world.start(lambda: dist.all_reduce(torch.ones(1), async_op=True))
            return ""
        with pytest.raises(PeerError) as caught:
            world.gather(None)
        return str(caught.value)
    finally:
        world.close()


def test_leaving_amid_an_exchange_does_not_hang() -> None:
    assert on_ranks(2, leave_amid_an_exchange) == ["", "rank 0 has left amid an exchange"]


def notes() -> list[Any]:
    world = connect({})
    try:
        world.post(f"from/{world.rank}", [world.rank, b"bytes"])
        with ThreadPoolExecutor() as threads:
            found = list(threads.map(lambda rank: world.read(f"from/{rank}", 20.0), range(2)))
        with pytest.raises(PeerError, match="no rank has left the note 'other' within 0.1 s"):
            world.read("other", 0.1)
        world.gather(None)
        world.forget(f"from/{world.rank}")
        with pytest.raises(PeerError, match="no rank has left the note"):
            world.read(f"from/{world.rank}", 0.1)
        return found
    finally:
        world.close()


def test_notes_are_left_and_read_in_any_thread() -> None:
    assert on_ranks(2, notes) == 2 * [[[0, b"bytes"], [1, b"bytes"]]]


def interrupt() -> int:
    world = connect({})
    try:
        if world.rank == 1:
            world.fail(Interrupted(signal.SIGTERM))
            return 0
        with pytest.raises(Interrupted) as caught:
            world.gather(None)
        return caught.value.number
    finally:
        world.close()


def test_a_signal_to_one_rank_interrupts_the_others() -> None:
    assert on_ranks(3, interrupt) == [signal.SIGTERM, 0, signal.SIGTERM]


def fail_and_recover() -> tuple[str, bool, list[int]]:
    world = connect({})
    try:
        if world.rank == 1:
            world.fail(ValueError("a bad sample"))
            error = ""
        else:
            with pytest.raises(PeerError) as caught:
                world.gather(None)
            error = str(caught.value)
        return error, world.recover(), world.gather(world.rank)
    finally:
        world.close()


def test_a_failed_rank_is_named_and_all_meet_again() -> None:
    results = on_ranks(3, fail_and_recover)
    text = "rank 1 has failed: a bad sample"
    assert results == [(text, True, [0, 1, 2]), ("", True, [0, 1, 2]), (text, True, [0, 1, 2])]
