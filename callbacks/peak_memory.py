"""Peak memory."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.tensors.device import MemoryPeak


class PeakMemory(PeriodicCallback):
    """Logs ``peak_memory_gb``, the peak since training began: of tensors on an accelerator, of the process on the CPU.

    The unit is 10^9 bytes. On the CPU the peak is that of the run on Linux only, and elsewhere that of the process.
    """

    logs: ClassVar[Sequence[str] | None] = ("peak_memory_gb",)
    is_repeatable: ClassVar[bool] = False

    @uses_no_rng
    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._peak = MemoryPeak(self.trainer.device)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        peak = max(self.data_container.world.gather(self._peak.bytes))
        self.writer.add_scalar("peak_memory_gb", peak / 1e9)
