"""The first module that makes a value which is not finite."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.pieces import local
from ksuit_runner.errors import LossError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.models.chosen_modules import check_not_compiled, chosen_modules, tapped
from ksuit_runner.tensors.first_not_finite import FirstNotFinite
from ksuit_runner.tensors.nested import tensors_in
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.parameter_rules import named_parameters
from ksuit_runner.ui.logs import OF_RANK


class NanWatch(PeriodicCallback):
    """Names the module that makes the first NaN or infinity, in the forward or the backward pass, and the update.

    It looks at the batch, the outputs of all modules, their gradients, and those of the parameters, in the order in
    which they are computed. A warning at the next interval, or when training fails, names the first one that is not
    finite. Each rank watches its own parts of the batch.

    It reads every activation once more, so it is meant for finding a cause: a run that has failed, resumed with this
    callback from an earlier checkpoint, fails again in the very same update. It only reports; ``trainer.nan_loss`` says
    what becomes of the update. In float16 infinite gradients are normal, so that only the forward pass is watched.

    Args:
        match: Patterns of the names of modules to watch; ``{}`` stands for the number of a layer. None watches all.
        **kwargs: Passed on to PeriodicCallback. Between two intervals it waits for no device.

    Raises:
        ConfigError: A pattern matches no module, or one that is never called; or the model is compiled.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, match: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        path = f"callbacks.{self.display_name}"
        check_not_compiled(self.model.module, path)
        self._modules = chosen_modules(self.model.module, match or ["*"], None, path)
        self._named = named_parameters(self.model.module, self.trainer.loss)
        self._follows_backward = not self.trainer.scaler.is_enabled()
        self._taps = ExitStack()
        self._seen = FirstNotFinite()

    @uses_no_rng
    def _before_every_accumulation_step(self, update_counter: UpdateCounter, batch: Any) -> None:
        self._taps.close()  # left open by a part whose loss was not finite
        self._seen.begin(update_counter.update + 1)
        for tensor in tensors_in(batch):
            self._seen.look("the batch", tensor)
        self._taps.enter_context(tapped(self._modules, self._follow))

    def _follow(self, module: str, outputs: Any) -> None:
        if not torch.is_grad_enabled():  # another callback computes something
            return
        what = f"the output of '{module}'" if module else "the output of the model"
        for output in tensors_in(outputs):
            self._seen.look(what, output)
            if self._follows_backward and output.grad_fn is not None:
                look = partial(self._seen.look, f"the gradient of {what}")
                output.register_hook(look)  # type: ignore[no-untyped-call]

    @uses_no_rng
    def _before_every_backward(self, update_counter: UpdateCounter, losses: Losses) -> None:
        self._taps.close()  # the backward pass may compute activations again
        self._seen.look("the loss", losses["total"])

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        for name, parameter in self._named.items() if self._follows_backward else ():
            if parameter.grad is not None:
                self._seen.look(f"the gradient of the parameter '{name}'", local(parameter.grad))

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self._warn()

    def _on_exception(self, error: BaseException) -> None:
        if not self._warn() and isinstance(error, LossError):
            self.logger.warning("the outputs of all modules are finite: the loss is what is not", extra=OF_RANK)

    def _warn(self) -> bool:
        """Warn of what was the first that is not finite since the last time; return whether there was anything."""
        if (found := self._seen.take()) is not None:
            self.logger.warning("%s", found, extra=OF_RANK)
        return found is not None

    def close(self) -> None:
        """Remove the hooks of an update that has failed."""
        self._taps.close()
