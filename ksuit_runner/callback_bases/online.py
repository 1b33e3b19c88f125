"""Base class of callbacks that accumulate what training computes anyway, and log it at intervals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.sums import Accumulated, PartSums

_SUMMED = "summed"


class RunningCallback(PeriodicCallback, Generic[Accumulated]):
    """A periodic callback that logs what was accumulated over the updates since its last log.

    A subclass makes what accumulates (``_new_sums``), and logs the result (``_log``). Each part of a batch has sums of
    its own, see ``PartSums``: neither a resume nor another number of ranks changes a bit of what is logged.

    Args:
        per_epoch: Log the values over each whole epoch as well, under keys that end in ``/epoch``.
        **kwargs: Passed on to PeriodicCallback.

    Attributes:
        running: The sums since the last log and, with ``per_epoch``, those of the present epoch.
    """

    is_repeatable: ClassVar[bool] = False
    merges_states: ClassVar[bool] = True
    replaces_state: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_accumulate" in vars(cls) and (
            cls._track_after_accumulation_step is CallbackBase._track_after_accumulation_step
        ):
            raise TypeError(
                f"{cls.__name__} has a method '_accumulate', which nothing calls: derive from OnlineCallback"
            )

    def __init__(self, per_epoch: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums = PartSums(self._new_sums, self.data_container.world, self.trainer.device)
        self._epoch = PartSums(self._new_sums, self.data_container.world, self.trainer.device) if per_epoch else None
        self.running = [self._sums] if self._epoch is None else [self._sums, self._epoch]

    @abstractmethod
    def _new_sums(self) -> Accumulated:
        """Return something empty to accumulate in, such as ``Sums``."""

    def _summed(self) -> str:
        """Return which arguments decide what is summed up: where a resume changes them, the sums begin anew."""
        return ""

    @abstractmethod
    def _log(self, sums: Accumulated, suffix: str) -> None:
        """Log what was accumulated.

        Args:
            sums: That of all parts and ranks since the last log, or in the whole epoch.
            suffix: The end of the metrics' keys: empty, or ``/epoch``.
        """

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self._log(self._sums.take(), "")

    @uses_no_rng
    def _after_epoch(self, update_counter: UpdateCounter) -> None:
        if self._epoch is not None:
            self._log(self._epoch.take(), "/epoch")

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last log, and those of the present epoch."""
        of_epoch = {} if self._epoch is None else {"epoch": self._epoch.state_dict()}
        return {**self._sums.state_dict(), **of_epoch, _SUMMED: self._summed()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the sums, unless a resume or a fork has changed what is summed up."""
        if state_dict.get(_SUMMED, self._summed()) != self._summed():
            self.logger.warning("%s has other arguments: it sums up anew from here on", self.display_name)
            return
        self._sums.load_state_dict(state_dict, self.trainer.accumulation_steps)
        if self._epoch is not None and "epoch" in state_dict:  # a fork may ask for what its parent did not
            self._epoch.load_state_dict(state_dict["epoch"], self.trainer.accumulation_steps)

    def merge_state_dicts(self, state_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the sums of the parts of all ranks."""
        of_epoch = [state["epoch"] for state in state_dicts if "epoch" in state]
        merged = {**PartSums.merged(state_dicts), **({"epoch": PartSums.merged(of_epoch)} if of_epoch else {})}
        return {**merged, _SUMMED: state_dicts[0].get(_SUMMED, self._summed())}  # in the order of a single rank's


class OnlineCallback(RunningCallback[Accumulated]):
    """A periodic callback that accumulates what it finds in the batches of training, and logs it at its interval.

    A subclass makes what accumulates (``_new_sums``), adds to it (``_accumulate``), and logs the result (``_log``).
    ``Sums`` never waits for the device between two logs. An accumulator of your own must not change the tensors that
    its ``state_dict`` has returned, as an update that fails goes back to them: it replaces them by new ones.
    """

    @abstractmethod
    def _accumulate(self, sums: Accumulated, batch: Any, losses: Losses, outputs: Any) -> None:
        """Add what is found in a part of a batch; the arguments are those of ``_track_after_accumulation_step``."""

    @uses_no_rng
    def _track_after_accumulation_step(
        self, update_counter: UpdateCounter, batch: Any, losses: Losses, outputs: Any
    ) -> None:
        for sums in self.running:
            self._accumulate(sums[update_counter.accumulation_step], batch, losses, outputs)
