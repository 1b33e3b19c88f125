"""Floating-point operations of training, and how much of the device they use."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, ClassVar

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.config.types import PositiveFloat, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.engine.phases import Phases
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.tensors.flops import FlopCount, is_compiled


class Flops(PeriodicCallback):
    """Logs ``flops_per_sample``, ``flops_per_second``, and with a peak ``utilization``, the share of it that is used.

    The operations of matrix products, convolutions, recurrent layers and attention are counted in the forward and the
    backward pass of the run's first update, with what is computed again to save memory; a multiplication and an
    addition are two. ``flops_per_second`` follows from the samples since the last log; the time of evaluations and
    checkpoints counts. For a transformer without recomputation, ``utilization`` is the MFU of Chowdhery et al. (2022,
    https://arxiv.org/abs/2204.02311).

    Args:
        phases: Tells when forward and backward pass begin and end.
        peak_tflops: What one device can do, in 10^12 operations per second of the type that it computes with.
        flops_per_sample: The operations per sample, where they cannot be counted: with ``trainer.compile``, or with
            kernels of your own.
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: A number is not positive, or the model is compiled.
    """

    logs: ClassVar[Sequence[str] | None] = ("flops_per_sample", "flops_per_second", "utilization")
    is_repeatable: ClassVar[bool] = False

    def __init__(
        self,
        phases: Phases,
        peak_tflops: PositiveFloat | None = None,
        flops_per_sample: PositiveFloat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveFloat", peak_tflops=peak_tflops, flops_per_sample=flops_per_sample)
        if flops_per_sample is None and is_compiled(self.model):
            raise ConfigError("flops_per_sample: it is needed with trainer.compile, as compiled code is not counted")
        self._peak, self._per_sample = peak_tflops, flops_per_sample
        self._count = FlopCount()
        if flops_per_sample is None:
            phases.watch(self)

    def begin(self, phase: str) -> None:
        """Count what is computed in this phase."""
        if self._per_sample is None and phase in ("forward", "backward"):
            self._count.__enter__()  # type: ignore[no-untyped-call]

    def end(self, phase: str) -> None:
        """Count no more."""
        if self._per_sample is None and phase in ("forward", "backward"):
            self._count.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._restart(update_counter)

    @quiet
    @uses_no_rng
    def _track_after_update_step(self, update_counter: UpdateCounter) -> None:
        if self._per_sample is None:
            samples = update_counter.sample - update_counter.sample_at(update_counter.update - 1)
            total = sum(self.data_container.world.gather(self._count.total))
            self._count.total = 0
            if self.trainer.loss_check.skips == 0:  # an update that is skipped has no backward pass
                self._per_sample = total / samples

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        if self._per_sample is None:
            return
        per_second = self._per_sample * (update_counter.sample - self._sample) / (perf_counter() - self._start)
        self.writer.add_scalar("flops_per_sample", self._per_sample)
        self.writer.add_scalar("flops_per_second", per_second)
        if self._peak is not None:
            self.writer.add_scalar("utilization", per_second / (self._peak * 1e12 * self.data_container.world.size))
        self._restart(update_counter)

    def _restart(self, update_counter: UpdateCounter) -> None:
        self._start, self._sample = perf_counter(), update_counter.sample

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted: another update may have samples of another size."""
        return {"flops_per_sample": self._per_sample}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what was counted, unless it is given."""
        self._per_sample = self._per_sample or state_dict["flops_per_sample"]
