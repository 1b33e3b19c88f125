"""Streams of batches that carry out a plan: in this process on demand, or ahead of time in worker processes."""

import os
import pickle
import signal
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_start_method, parent_process
from threading import Thread
from types import TracebackType
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset

from ksuit_runner.data.fetch_batch import BatchRequest, fetch_batch
from ksuit_runner.data.packed import pack
from ksuit_runner.data.row_blocks import PlanAhead, RowBlocks
from ksuit_runner.system.signals import SIGNALS

_SENDER_IS_KNOWN: Final = hasattr(
    signal, "sigwaitinfo"
)  # not on macOS and Windows: there a group's SIGTERM ends workers


class Stream(ABC):
    """Batches in the order of a plan; which one comes next is known before it is taken.

    Attributes:
        head: Request of the next batch, or None at the end.
    """

    head: BatchRequest | None

    @abstractmethod
    def take(self) -> Any:
        """Return the batch of ``head`` and move on.

        Raises:
            Exception: What the dataset raised; from a worker process, its message holds the worker's traceback.
        """

    @abstractmethod
    def drop(self) -> None:
        """Move on without the batch of ``head``."""

    @abstractmethod
    def close(self) -> None:
        """End the stream; ``head`` is None from here on."""


class LocalStream(Stream):
    """Fetches in this process, when a batch is asked for; small ones that are only rows of tensors, a few at a time."""

    def __init__(self, datasets: Mapping[str, Any], seed: int, plan: Iterable[BatchRequest]) -> None:
        self._datasets = datasets
        self._seed = seed
        self._plan = PlanAhead(plan)
        self._blocks = RowBlocks(datasets, self._plan)
        self.head = self._plan.next()

    def take(self) -> Any:
        """Fetch the batch of ``head`` and move on."""
        request = self.head
        assert request is not None
        batch = self._blocks.take(request)
        self.head = self._plan.next()
        return fetch_batch(self._datasets, self._seed, request) if batch is None else [batch]

    def drop(self) -> None:
        """Move on without fetching."""
        self._blocks.drop()
        self.head = self._plan.next()

    def close(self) -> None:
        """End the stream."""
        self._blocks.clear()
        self.head = None


class WorkerStream(Stream):
    """Fetches in worker processes, ahead of time; they start once and stay until the stream is closed.

    To the DataLoader, our requests are the indices, and what carries them out is the dataset. So one set of workers
    serves all datasets, and the plan alone decides what is fetched when.

    Args:
        datasets: Sources by key.
        seed: Seed of the run.
        plan: What is fetched, in this order.
        num_workers: Number of processes.
        prefetch: How many batches each of them fetches ahead.
        pin_memory: Whether batches are moved to memory from which the current GPU copies behind the program.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        seed: int,
        plan: Iterable[BatchRequest],
        num_workers: int,
        prefetch: int,
        pin_memory: bool = False,
    ) -> None:
        self._sent: deque[BatchRequest] = deque()
        loader = DataLoader(
            _Fetcher(datasets, seed),
            batch_size=None,
            sampler=self._send(plan),
            num_workers=num_workers,
            multiprocessing_context=_start_method(),
            prefetch_factor=prefetch,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else the start draws from the generator of the run
        )
        with _signals_blocked():
            self._batches: Any = iter(loader)

    def _send(self, plan: Iterable[BatchRequest]) -> Iterator[BatchRequest]:
        for request in plan:
            self._sent.append(request)
            yield request

    @property
    def head(self) -> BatchRequest | None:  # type: ignore[override]
        """Request of the next batch: the oldest one that was sent to the workers."""
        return self._sent[0] if self._sent else None

    def take(self) -> Any:
        """Wait for the batch of ``head`` and move on."""
        self._sent.popleft()
        return next(self._batches)

    def drop(self) -> None:
        """Wait for the batch of ``head`` and discard it."""
        self.take()

    def close(self) -> None:
        """End the worker processes."""
        self._sent.clear()
        if self._batches is not None:
            # Releasing the iterator does the same, but not while the traceback of an error still refers to it.
            self._batches._shutdown_workers()
            self._batches = None


class _Fetcher(Dataset[Any]):
    def __init__(self, datasets: Mapping[str, Any], seed: int) -> None:
        self._datasets = datasets
        self._seed = seed

    def __getitem__(self, request: BatchRequest) -> Any:
        return fetch_batch(self._datasets, self._seed, request)

    def __reduce__(self) -> Any:
        return _unpacked, (pack(self._datasets), self._seed)


def _unpacked(datasets: bytes, seed: int) -> "_Fetcher":
    return _Fetcher(pickle.loads(datasets), seed)


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start processes with signals blocked, so that none ends them before they have set up how to react."""
    if not _SENDER_IS_KNOWN:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_method() -> str:
    """Return how workers start: Python's default in a job of joblib, which sets a method that only joblib can use."""
    chosen, usable = get_start_method(), get_all_start_methods()
    return chosen if chosen in usable else usable[0]


def _start_worker(worker: int) -> None:
    """Let the main process decide when a worker ends: it finishes the update even if the whole group gets a signal.

    Ctrl-C reaches every process of a terminal, and a scheduler's signals every process of a job. SIGTERM still ends
    a worker if its own parent sends it, which torch does with workers that hang.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _report
    for name in ("stdout", "stderr"):  # a bar there is the main process's to draw
        setattr(sys, name, getattr(getattr(sys, name), "rich_proxied_file", getattr(sys, name)))
    Thread(target=_end_after_parent, daemon=True).start()
    if _SENDER_IS_KNOWN:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_by_parent, daemon=True).start()


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an error of a thread, unless it is that the main process left while it took a batch."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_after_parent() -> None:
    """End when the main process is gone. Torch checks that too, but not if it is killed while workers start."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end_by_parent() -> None:
    parent = parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
