"""What a model consists of."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from pandas import DataFrame
from torch import nn

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.config.types import NonNegativeInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.tensors.device import to_device
from ksuit_runner.tensors.flops import FlopCount, is_compiled
from ksuit_runner.tensors.nested import tensors_in

COLUMNS = ("module", "type", "output", "trained", "frozen", "flops")


class ModelSummary(CallbackBase):
    """Logs a table ``model_summary`` before the first update: what each module has, returns and computes.

    Its columns are the name of the module, its class, the shape of its output, the numbers of its parameters that are
    trained and frozen, with those of the modules in it, and the floating-point operations of its forward pass per
    sample (see ``flops``). The first row is the whole model. Shapes and operations are those of a batch of the first
    training samples, in evaluation mode; they are missing where the model does not take the inputs as they are.

    Args:
        depth: How many levels of modules to show; None shows all.
        prints: Also show the table on the terminal.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: The depth is negative.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, depth: NonNegativeInt | None = 3, prints: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_numbers("NonNegativeInt", depth=depth)
        self._depth, self._prints = depth, prints

    def _before_training(self, update_counter: UpdateCounter) -> None:
        modules = {name: module for name, module in self.model.module.named_modules() if self._is_shown(name)}
        shapes, flops = self._watch_forward(modules)
        rows = []
        for name, module in modules.items():
            parameters = list(module.parameters())
            trained = sum(item.numel() for item in parameters if item.requires_grad)
            frozen = sum(item.numel() for item in parameters) - trained
            kind = type(module).__name__.removeprefix("FSDP")  # FSDP changes the class of a module
            rows.append((name, kind, shapes.get(name), trained, frozen, flops.get(name)))
        self.writer.add_table("model_summary", COLUMNS, rows)
        if self._prints:
            self.logger.info("%s", DataFrame(rows, columns=COLUMNS).fillna("").to_string(index=False))

    def _is_shown(self, name: str) -> bool:
        return self._depth is None or not name or name.count(".") < self._depth

    def _watch_forward(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, str], dict[str, float]]:
        """Return the shapes of outputs, and the operations per sample, by the name of the module."""
        shapes: dict[str, str] = {}
        flops: dict[str, float] = defaultdict(float)
        begun: list[int] = []
        with ExitStack() as stack, FlopCount() as count:
            if is_compiled(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))

            def before(module: nn.Module, inputs: Any) -> None:
                begun.append(count.total)

            def after(module: nn.Module, inputs: Any, outputs: Any, name: str) -> None:
                shapes.setdefault(name, ", ".join(str(tuple(item.shape)) for item in tensors_in(outputs)))
                flops[name] += (count.total - begun.pop()) / samples

            for name, module in modules.items():
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(partial(after, name=name)).remove)
            try:
                batch = self.data_container.first_samples()
                samples = self.trainer.batch_size(batch)
                inputs, _ = self.trainer.inputs_and_targets(to_device(batch, self.trainer.device))
                self.trainer.predict(inputs)
            except Exception as error:  # a stream, or inputs that only training_step can make
                self.logger.warning("the summary lacks shapes and operations: %s: %s", type(error).__name__, error)
        return shapes, flops
