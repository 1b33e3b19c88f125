"""Size of the activations of modules."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

from ksuit_runner.callback_bases.part_sums import PartSumsCallback
from ksuit_runner.config.types import PositiveInt
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.models.chosen_modules import check_not_compiled, chosen_modules, tapped
from ksuit_runner.tensors.nested import tensors_in
from ksuit_runner.trainer.losses import Losses


class ActivationNorms(PartSumsCallback):
    """Logs ``activation_norms/MODULE``, the root mean square of the elements of what a module returns in training.

    The values are those of the update after which the callback acts, over its whole batch; they do not depend on the
    size of the batch. Other updates are not looked at. Initializations and learning rates are chosen so that these
    values are alike from layer to layer, and from one width of a network to another (Yang et al., Tensor Programs V,
    2022, https://arxiv.org/abs/2203.03466, appendix D.1).

    Args:
        match: Patterns of the names of modules; ``{}`` stands for the number of a layer. None goes by depth.
        depth: How many levels below the model the modules are; modules without children count at higher levels as
            well. None takes all modules without children, wherever they are.
        **kwargs: Passed on to PartSumsCallback.

    Raises:
        ConfigError: A pattern matches no module, or one that is never called; the depth is no positive whole number; or
            the model is compiled.
    """

    logs: ClassVar[Sequence[str] | None] = ("activation_norms", "activation_norms/*")

    def __init__(self, match: Sequence[str] | None = None, depth: PositiveInt | None = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        path = f"callbacks.{self.display_name}"
        check_not_compiled(self.model.module, path)
        self._modules = chosen_modules(self.model.module, match, depth, path)
        self._taps = ExitStack()
        self._part = 0

    @uses_no_rng
    def _before_every_accumulation_step(self, update_counter: UpdateCounter, batch: Any) -> None:
        self._taps.close()  # left open by a part whose loss was not finite
        if self.follows(update_counter):
            self._part = update_counter.accumulation_step
            self._taps.enter_context(tapped(self._modules, self._add))

    def _add(self, module: str, outputs: Any) -> None:
        if not torch.is_grad_enabled():  # another callback computes something
            return
        for output in tensors_in(outputs):
            if output.is_floating_point() and output.layout is torch.strided:
                dtype = torch.promote_types(output.dtype, torch.float32)  # torch refuses a narrower one
                norm: Tensor = torch.linalg.vector_norm(output.detach(), dtype=dtype)
                self.sums[self._part].add(module, norm.square(), count=output.numel())

    @uses_no_rng
    def _before_every_backward(self, update_counter: UpdateCounter, losses: Losses) -> None:
        self._taps.close()  # the backward pass may compute activations again

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self._taps.close()
        for module, total in self.sums.take().totals.items():
            self.writer.add_scalar(f"activation_norms/{module}".rstrip("/"), total.mean.sqrt())

    def close(self) -> None:
        """Remove the hooks of an update that has failed."""
        self._taps.close()
