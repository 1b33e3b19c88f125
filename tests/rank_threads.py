"""Ranks as threads of one process: what they exchange goes through memory, and a test may let any of them die."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from ksuit_runner.distributed.pieces import Piece
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import PeerError


class Exchange:
    """What the ranks of a world share.

    Attributes:
        notes: Notes by key.
        lost: Ranks that are no more.
    """

    def __init__(self, size):
        self.size = size
        self.notes = {}
        self.lost = set()
        self.news = threading.Condition()
        self.barrier = threading.Barrier(size, timeout=20)
        self.values = [None] * size


class ThreadWorld(World):
    def __init__(self, exchange, rank):
        self.exchange, self.rank, self.size = exchange, rank, exchange.size

    def gather(self, value):
        self.exchange.values[self.rank] = msgspec.msgpack.encode(value)
        self.exchange.barrier.wait()
        found = [msgspec.msgpack.decode(item) for item in self.exchange.values]
        self.exchange.barrier.wait()
        return found

    def gather_tensors(self, tensors):
        self.exchange.values[self.rank] = [item.clone() for item in tensors]
        self.exchange.barrier.wait()
        found = list(self.exchange.values)
        self.exchange.barrier.wait()
        return found

    def broadcast(self, value):
        return self.gather(value if self.rank == 0 else None)[0]

    def post(self, key, value):
        if self.rank in self.exchange.lost:
            raise PeerError("this rank is lost to the others")
        with self.exchange.news:
            self.exchange.notes[key] = msgspec.msgpack.encode(value)
            self.exchange.news.notify_all()

    def read(self, key, timeout_s):
        end = time.monotonic() + timeout_s
        with self.exchange.news:
            while key not in self.exchange.notes:
                if self.exchange.lost:
                    raise PeerError(f"rank {min(self.exchange.lost)} is lost")
                if not self.exchange.news.wait(max(0.0, end - time.monotonic())):
                    raise PeerError(f"no note {key.rpartition('/')[2]} in {timeout_s:g} s")
            return msgspec.msgpack.decode(self.exchange.notes[key])

    def forget(self, key):
        with self.exchange.news:
            del self.exchange.notes[key]

    def lose(self):
        """Let this rank be lost, as after SIGKILL."""
        with self.exchange.news:
            self.exchange.lost.add(self.rank)
            self.exchange.news.notify_all()


def on_ranks(size, function):
    """Return what a function of the world returns on each rank; the first error of any is raised at the end."""
    exchange = Exchange(size)
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(function, ThreadWorld(exchange, rank)) for rank in range(size)]
    return [future.result() for future in futures]


def piece(tensor, rank, size, dim=0):
    """Return what a rank has of a tensor that is cut along a dimension as evenly as torch does."""
    each = -(-tensor.shape[dim] // size)
    start = min(rank * each, tensor.shape[dim])
    length = min(each, tensor.shape[dim] - start)
    offset = [0] * tensor.ndim
    offset[dim] = start
    return Piece(tensor.narrow(dim, start, length).clone(), tuple(offset), tuple(tensor.shape))


def blocks(tensor, rows, columns, rank):
    """Return what a rank has of a matrix that is cut into ``rows`` times ``columns`` blocks."""
    found = piece(tensor, rank // columns, rows)
    inner = piece(found.tensor, rank % columns, columns, dim=1)
    return Piece(inner.tensor, (found.offset[0], inner.offset[1]), tuple(tensor.shape))


def state_of(rank, size, seed=0):
    """Return the model's values, a callback's file, and the state, of which a rank has its pieces."""
    draws = torch.Generator().manual_seed(seed)
    uneven, matrix, tiny = (torch.randn(shape, generator=draws) for shape in ((7, 3), (8, 6), (1, 2)))
    model = {
        "uneven": piece(uneven, rank, size),
        "columns": piece(matrix, rank, size, dim=1),
        "tiny": piece(tiny, rank, size),
        "half": piece(uneven.bfloat16(), rank, size),
        "everywhere": torch.arange(3),
    }
    ema = {"uneven": piece(uneven / 2, rank, size)}
    optimizer = {"uneven": {"exp_avg": piece(uneven * 2, rank, size), "step": torch.tensor(5.0)}}
    whole = {
        "uneven": uneven,
        "columns": matrix,
        "tiny": tiny,
        "half": uneven.bfloat16(),
        "everywhere": torch.arange(3),
    }
    return model, ema, {"trainer": {"optimizer": optimizer}, "callbacks": {"a": {"n": 1}}}, whole
