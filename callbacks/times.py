"""Where the time of an update goes."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.engine.phases import PHASES, Phases
from ksuit_runner.engine.stopwatch import Stopwatch
from ksuit_runner.keyed_random import uses_no_rng


class Times(PeriodicCallback):
    """Logs how long the phases of an update take, in seconds: the mean and the longest since the last log.

    These are ``time/PHASE/mean`` and ``time/PHASE/max`` for the phases ``data`` (waiting for the batch and moving it to
    the device), ``forward``, ``backward``, ``step``, ``callbacks``, ``log``, ``checkpoint``, and the whole ``update``;
    and ``time/callback/NAME``, the mean of each callback. Evaluations count as time of the callbacks.

    On a CUDA device forward, backward and step are the times of the device, which is waited for only when they are
    logged; everything else is the time of the process. Of several ranks, the largest one counts for ``max``, and their
    mean otherwise. The values differ from run to run, so there is no state to resume.

    Args:
        phases: Tells when a phase begins and ends.
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("time/update/mean", "time/update/max", "time/*")
    is_repeatable: ClassVar[bool] = False

    def __init__(self, phases: Phases, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._phases, self._watch = phases, Stopwatch(self.trainer.device)
        phases.watch(self._watch)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        means, largest = self._watch.take()
        phases = ["update", *PHASES]
        of_ranks = self.data_container.world.gather([largest[phase] for phase in phases])
        for phase, longest in zip(phases, map(max, zip(*of_ranks, strict=True)), strict=True):
            self.writer.add_scalar(f"time/{phase}/mean", means[phase])
            self.writer.add_scalar(f"time/{phase}/max", longest)
        for phase in self._phases.callbacks:
            self.writer.add_scalar(f"time/{phase}", means[phase])
