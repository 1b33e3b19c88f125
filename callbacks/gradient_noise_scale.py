"""How large a batch is worth it: the gradient noise scale."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.part_sums import PartSumsCallback
from ksuit_runner.config.types import OpenFraction, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.backward import allow_several_passes, extra_gradients
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.module_norms import dense_values
from ksuit_runner.trainer.sums import to_device


class GradientNoiseScale(PartSumsCallback):
    """Logs ``gradient_noise_scale``, about the number of samples above which a larger batch no longer helps.

    It is tr(S) / |G|^2: the variance of the gradient of a sample over the squared norm of the mean gradient, both
    estimated from the gradients of a whole batch and of its parts, and averaged over the updates that it looks at. Far
    below it every further sample in a batch helps (data parallelism pays); far above it most are wasted. The first
    values are noise, and may be negative. It needs a batch in several parts (``trainer.accumulation_steps``), and does
    another backward pass for each of them in the updates after which it acts.

    Source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162, appendix A.1.

    Args:
        decay: Decay of the averages, from one look to the next.
        **kwargs: Passed on to PartSumsCallback.

    Raises:
        ConfigError: A batch has one part only, the decay is not between 0 and 1, or parameters are spread over ranks.
    """

    logs: ClassVar[Sequence[str] | None] = ("gradient_noise_scale",)

    def __init__(self, decay: OpenFraction = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_numbers("OpenFraction", decay=decay)
        if self.trainer.accumulation_steps < 2:
            raise ConfigError("it compares parts of a batch: set trainer.accumulation_steps=2, which trains the same")
        if self.trainer.strategy.is_sharded:
            raise ConfigError("strategy=fsdp has no gradients of single parts; use strategy=ddp")
        allow_several_passes(self.model)
        self._decay = decay
        self._whole: Tensor | None = None
        self._averages = torch.zeros(2, device=self.trainer.device)  # variance and signal
        self._looks = 0

    @uses_no_rng
    def _before_every_backward(self, update_counter: UpdateCounter, losses: Losses) -> None:
        turns = self.trainer.optimizers.turns
        if self.follows(update_counter) and (trained := turns.at(update_counter.update).trained()):
            loss, scaler = losses["total"], self.trainer.scaler
            gradients = extra_gradients(loss, trained, scaler)
            norms = self.trainer.strategy.norms([dense_values(gradient) for gradient in gradients])
            square = (norms / scaler.scale(torch.ones((), device=loss.device))).square().sum()
            self.sums[update_counter.accumulation_step].add("square", square, count=1)

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        if self.follows(update_counter):
            held = [dense_values(item.grad) for item in self.trainer.optimizers.parameters if item.grad is not None]
            self._whole = self.trainer.strategy.norm(held).square() if held else None

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        of_parts, whole = self.sums.take().totals.get("square"), self._whole
        self._whole = None
        if of_parts is None or whole is None:  # the update was skipped, or had nothing to train
            return
        samples = update_counter.sample - update_counter.sample_at(update_counter.update - 1)
        in_part, part = samples / of_parts.count, of_parts.mean
        if self.trainer.sums_up:  # gradients of sums over the samples
            part, whole = part / in_part**2, whole / samples**2
        variance = (part - whole) / (1 / in_part - 1 / samples)
        signal = (samples * whole - in_part * part) / (samples - in_part)
        weight = max(1 - self._decay, 1 / (self._looks + 1))
        found = torch.stack([variance, signal])
        moved = torch.lerp(self._averages.to(found), found, weight)
        self._averages = torch.where(moved.isfinite().all(), moved, self._averages)  # float16 may have overflowed
        self._looks += 1
        self.writer.add_scalar("gradient_noise_scale", self._averages[0] / self._averages[1])

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, and the squared norms of an update that is done and not looked at yet."""
        averages = dict(zip(("variance", "signal"), self._averages, strict=True))
        return {**super().state_dict(), **averages, "looks": self._looks, "whole": self._whole}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state_dict)
        self._averages = to_device(torch.stack([state_dict["variance"], state_dict["signal"]]), self.trainer.device)
        self._looks, self._whole = state_dict["looks"], to_device(state_dict["whole"], self.trainer.device)
