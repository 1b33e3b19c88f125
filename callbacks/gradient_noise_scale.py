"""How large a batch is worth it: the gradient noise scale."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import undisturbed, uses_no_rng
from ksuit_runner.trainer.backward import allow_several_passes
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.module_norms import dense_values
from ksuit_runner.trainer.sums import PartSums, Sums, to_device


class GradientNoiseScale(PeriodicCallback):
    """Logs ``gradient_noise_scale``, about the number of samples above which a larger batch no longer helps.

    It is tr(S) / |G|^2: the variance of the gradient of a single sample, summed up over all parameters, divided by the
    squared norm of the mean gradient. Both are estimated from the squared norms of the gradients of the whole batch and
    of its parts, and averaged over the updates that are looked at. Much smaller batches train as well for each sample
    (data parallelism pays), in much larger ones most samples are wasted. The first values are noise, and may be
    negative.

    It needs a batch in several parts (``trainer.accumulation_steps``), and does another backward pass for each part, in
    the updates after which it acts only.

    Source: McCandlish et al., An Empirical Model of Large-Batch Training, 2018, https://arxiv.org/abs/1812.06162,
    appendix A.1.

    Args:
        decay: Decay of the averages, from one look to the next.
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: A batch has one part only, the decay is not between 0 and 1, or parameters are spread over ranks.
    """

    logs: ClassVar[Sequence[str] | None] = ("gradient_noise_scale",)
    merges_states: ClassVar[bool] = True

    def __init__(self, decay: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        path = f"callbacks.{self.display_name}"
        if not 0 < decay < 1:
            raise ConfigError(f"decay: a number between 0 and 1 is needed, not {decay}")
        if self.trainer.accumulation_steps < 2:
            raise ConfigError(
                "it compares parts of a batch with the whole: set trainer.accumulation_steps=2, which trains the same",
                path=path,
            )
        if self.trainer.strategy.is_sharded:
            raise ConfigError("strategy=fsdp has no gradients of single parts; use strategy=ddp", path=path)
        allow_several_passes(self.model)
        self._decay = decay
        self._parts = PartSums(Sums, self.data_container.world, self.trainer.device)
        self._whole: Tensor | None = None
        self._variance = self._signal = torch.zeros((), device=self.trainer.device)
        self._looks = 0

    @uses_no_rng
    def _before_every_backward(self, update_counter: UpdateCounter, losses: Losses) -> None:
        if not self.follows(update_counter):
            return
        if trained := self.trainer.optimizers.turns.at(update_counter.update).trained():
            square = self._square(losses["total"], trained)
            self._parts[update_counter.accumulation_step].add("square", square, count=1)

    def _square(self, loss: Tensor, trained: Sequence[Tensor]) -> Tensor:
        """Return the squared norm of the gradient of a loss."""
        scaler = self.trainer.scaler
        scale = scaler.scale(torch.ones((), device=loss.device))
        with torch.enable_grad(), undisturbed():  # the backward pass of training draws the same again
            found = torch.autograd.grad(scaler.scale(loss), trained, retain_graph=True, allow_unused=True)
        norms = self.trainer.strategy.norms([dense_values(item) for item in found if item is not None])
        return (norms / scale).square().sum()

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        if self.follows(update_counter):
            gradients = [item.grad for item in self.trainer.optimizers.parameters]
            held = [dense_values(item) for item in gradients if item is not None]
            self._whole = self.trainer.strategy.norm(held).square() if held else None

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        of_parts, whole = self._parts.take().totals.get("square"), self._whole
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
        is_usable = variance.isfinite() & signal.isfinite()  # not if float16 has overflowed
        self._variance = torch.where(is_usable, torch.lerp(self._variance, variance, weight), self._variance)
        self._signal = torch.where(is_usable, torch.lerp(self._signal, signal, weight), self._signal)
        self._looks += 1
        self.writer.add_scalar("gradient_noise_scale", self._variance / self._signal)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, and the squared norms of an update that is done and not looked at yet."""
        averages = {"variance": self._variance, "signal": self._signal, "looks": self._looks}
        return {**self._parts.state_dict(), **averages, "whole": self._whole}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self._parts.load_state_dict(state_dict, self.trainer.accumulation_steps)
        device = self.trainer.device
        self._variance, self._signal = (to_device(state_dict[name], device) for name in ("variance", "signal"))
        self._looks, self._whole = state_dict["looks"], to_device(state_dict["whole"], device)

    def merge_state_dicts(self, state_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the averages, which are the same on all ranks, and the parts of all of them."""
        return {**state_dicts[0], **PartSums.merged(state_dicts)}
