"""Supplies the batches of a run: from the stream that fetches them ahead of time, or fetched when asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np

from ksuit_runner.data.fetch_batch import EVALUATION, BatchRequest, Part, fetch_batch
from ksuit_runner.data.stream import Stream
from ksuit_runner.data.training_stream import TrainingStream
from ksuit_runner.system.signals import Interruption

Sources = Mapping[str, Any]
NewStream = Callable[[Iterable[BatchRequest], Sources], Stream]


class BatchSupply:
    """Takes batches from the stream of a run, in its order, and fetches those that it does not have.

    Args:
        new_stream: Opens another stream.
        seed: Seed of the run.
        training: What the run trains on, if that is a stream.
        interruption: Signals that end a wait for data.
        grace_s: How long the batch of an update may still take after such a signal, in seconds.
    """

    def __init__(
        self,
        new_stream: NewStream,
        seed: int,
        training: TrainingStream | None,
        interruption: Interruption,
        grace_s: float,
    ) -> None:
        self._new_stream = new_stream
        self._seed = seed
        self._training = training
        self._interruption = interruption
        self._grace_s = grace_s
        self._stream: Stream | None = None
        self._delivered: list[Part] = []
        self._wait_seconds = 0.0

    def open(self, stream: Stream) -> None:
        """Take batches from this stream from now on."""
        self._stream = stream

    def close(self) -> None:
        """End the stream and its workers; another one may be opened."""
        self._delivered = []
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def next_training_batch(self) -> list[Part]:
        """Return this rank's parts of the next update's batch; see ``DataContainer.next_training_batch``."""
        stream = self._stream
        assert stream is not None, "open() comes first"
        start = perf_counter()
        try:
            while (head := stream.head) is not None and head.epoch == EVALUATION:
                stream.drop()
            if head is None:
                raise StopIteration("there is no further update")
            return self._deliver_parts(self._interruption.wait_for(stream.take, self._grace_s), head)
        finally:
            self._wait_seconds += perf_counter() - start

    def evaluation_batches(self, requests: Iterator[BatchRequest], sources: Sources) -> Iterator[Any]:
        """Yield the batches of an evaluation: from the stream as far as they are next in it."""
        stream = self._stream
        if stream is None or stream.head is None:
            yield from self._from_a_stream_of_its_own(requests, sources)
            return
        while stream.head is not None and stream.head.epoch == EVALUATION and not stream.head.begins:
            stream.drop()  # the rest of an evaluation that ended early
        for request in requests:
            if stream.head is not None and stream.head.is_same(request):
                yield self._deliver(self._interruption.wait_for(stream.take), len(request.indices))
            else:
                yield self.fetch(request, sources)

    def _from_a_stream_of_its_own(self, requests: Iterator[BatchRequest], sources: Sources) -> Iterator[Any]:
        stream = self._new_stream(requests, sources)
        try:
            while (head := stream.head) is not None:
                yield self._deliver(self._interruption.wait_for(stream.take), len(head.indices))
        finally:
            stream.close()

    def batches_of_a_stream(self, key: str, source: Any, size: int, numbers: Iterator[int]) -> Iterator[Any]:
        """Yield batches of a dataset that can only be iterated over, in this process: nobody knows how many it has.

        Args:
            key: Key of the dataset.
            source: What reads it; each of its batches comes with the number of samples.
            size: Samples per batch.
            numbers: Numbers of the batches, ascending.
        """
        wanted = next(numbers, None)
        for number in count():
            if wanted is None:
                return
            request = BatchRequest(key, EVALUATION, number, np.arange(number * size, (number + 1) * size))
            batch, samples = self._interruption.wait_for(partial(fetch_batch, {key: source}, self._seed, request))
            if samples and number == wanted:
                yield self._deliver(batch, samples)
                wanted = next(numbers, None)
            if samples < size:
                return

    def fetch(self, request: BatchRequest, sources: Sources) -> Any:
        """Fetch a batch in this process."""
        take = partial(fetch_batch, sources, self._seed, request)
        return self._deliver(self._interruption.wait_for(take), len(request.indices))

    def samples_in(self, batch: Any) -> int | None:
        """Return how many samples were fetched for the batch, or the parts, returned last; None for any other batch."""
        return next((part.samples for part in self._delivered if part.batch is batch), None)

    def take_wait_seconds(self) -> float:
        """Return how long training has waited for data since the last call, in seconds."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def _deliver_parts(self, batches: Sequence[Any], request: BatchRequest) -> list[Part]:
        if self._training is not None:
            batches = [self._training.unpack(batch, request) for batch in batches]
        assert request.spans is not None
        self._delivered = [
            Part(batch, number, stop - start)
            for batch, (number, start, stop) in zip(batches, request.spans, strict=True)
        ]
        return self._delivered

    def _deliver(self, batch: Any, samples: int) -> Any:
        self._delivered = [Part(batch, 0, samples)]
        return batch
