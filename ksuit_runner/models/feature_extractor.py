"""Features of any layer of a model, taken while it computes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.models.base import ModelBase
from ksuit_runner.models.chosen_modules import tapped
from ksuit_runner.tensors.name_patterns import matching_modules
from ksuit_runner.tensors.nested import tensors_in

POOLINGS: Final = ("none", "mean", "max", "cls", "flatten")


class FeatureExtractor:
    """Returns what layers of a model compute, pooled to the features of each sample.

    It hooks into the layers for the time of one forward pass, which is not compiled. Of a layer that returns several
    tensors the first one counts, of a layer that is called several times its last call.

    Args:
        module: The plain module whose layers are meant; other weights of it are extracted from in the same way.
        layers: Names of its submodules, or patterns of them; None takes its outputs, under the name ``output``.
        pooling: What becomes of an output of shape (samples, ...): ``none`` leaves it, ``flatten`` makes it (samples,
            values), ``mean`` and ``max`` (samples, channels) over all tokens or pixels, ``cls`` takes the first token
            of (samples, tokens, channels).
        channel_dim: The dimension of the channels for ``mean`` and ``max``. By default it is the last one of (samples,
            tokens, channels), and the second one where there are more dimensions, as of images.
        path: Config path of the arguments, for messages.

    Attributes:
        names: The names of the layers.

    Raises:
        ConfigError: There is no such layer or pooling.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str] | None = None,
        pooling: str = "mean",
        channel_dim: int | None = None,
        path: str = "",
    ) -> None:
        if pooling not in POOLINGS:
            raise ConfigError(f"there is no '{pooling}'. {did_you_mean(pooling, POOLINGS)}", path=f"{path}.pooling")
        known = [name for name, _ in module.named_modules() if name]
        self.names = ["output"] if layers is None else matching_modules(layers, known, f"{path}.layers", "layer")
        self._layers = {name: "" if layers is None else name for name in self.names}
        self._pooling = pooling
        self._channel_dim = channel_dim
        self._path = path

    def __call__(self, model: nn.Module, compute: Callable[[], Any]) -> dict[str, Tensor]:
        """Return the features of the samples by the names of the layers, each of shape (samples, ...), in float32.

        Args:
            model: The live model, or another one with the same layers.
            compute: Lets the model compute the samples.

        Raises:
            ConfigError: A layer computes no tensor that can be pooled so.
        """
        module = model.module if isinstance(model, ModelBase) else model
        layers = {name: module.get_submodule(layer) for name, layer in self._layers.items()}
        found: dict[str, Tensor] = {}
        # Compiled code may know nothing of the hooks.
        with tapped(layers, partial(self._take, found)), torch.compiler.set_stance("force_eager"):
            compute()
        for name in self.names:
            if name not in found:
                raise ConfigError(
                    f"'{name}' computes no tensor in the model's forward pass", path=f"{self._path}.layers"
                )
        return {name: found[name] for name in self.names}

    def _take(self, found: dict[str, Tensor], name: str, output: Any) -> None:
        """Take the features at once: the next layer may change what it is given in place."""
        if (first := next(tensors_in(output), None)) is not None:
            found[name] = self._pooled(name, first.detach().float())

    def _pooled(self, name: str, output: Tensor) -> Tensor:
        if self._pooling == "none":
            return output.clone()
        if self._pooling == "flatten":
            return output.flatten(1).clone()
        if self._pooling == "cls":
            self._check(output.ndim == 3, name, output, "is not (samples, tokens, channels)")
            return output[:, 0].clone()
        self._check(output.ndim > 1, name, output, "has no channels")
        channels = self._channel_dim if self._channel_dim is not None else -1 if output.ndim == 3 else 1
        self._check(channels % output.ndim > 0 and abs(channels) < output.ndim, name, output, f"has no {channels=}")
        others = [dim for dim in range(1, output.ndim) if dim != channels % output.ndim]
        if not others:
            return output.clone()
        return output.mean(others) if self._pooling == "mean" else output.amax(others)

    def _check(self, is_right: bool, name: str, output: Tensor, what: str) -> None:
        if not is_right:
            raise ConfigError(
                f"the output of '{name}', of shape {tuple(output.shape)}, {what}", path=f"{self._path}.pooling"
            )
