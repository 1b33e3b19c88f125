"""The wrapper that makes any module a model of a run."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ksuit_runner.distributed.pieces import gathered, is_sharded, place
from ksuit_runner.distributed.world import World
from ksuit_runner.models.kept_buffers import KeptBuffers
from ksuit_runner.tensors.layout import lay_out, overlaps, same_form, unusual_strides
from ksuit_runner.tensors.module_tree import copy_rest


class ModelBase(nn.Module):
    """What the runner needs of a model, around any ``torch.nn.Module``.

    The wrapped module needs no base class of ours. Its ``state_dict`` is what checkpoints hold, so that
    ``model.safetensors`` loads into the plain module, without the runner and whether it was compiled or not.

    Args:
        module: The module that computes.

    Attributes:
        module: The module that computes.
        copier: Returns a copy of the module where Python's ``deepcopy`` cannot, as of one that is spread over ranks.
        blank: Returns such a module as it was before that, with parameters that have no data.
        kept_buffers: Puts the buffers back that a forward pass in evaluation mode has changed.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.copier: Callable[[], nn.Module] | None = None
        self.blank: Callable[[], nn.Module] | None = None
        self.kept_buffers = KeptBuffers()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs of the wrapped module."""
        if self.training:
            return self.module(*args, **kwargs)
        with self.kept_buffers.watch(self.module):
            return self.module(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device that the weights are on; the CPU for a model without any."""
        return next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)

    def tensors(self) -> dict[str, Any]:
        """Return what the wrapped module's ``state_dict`` has: parameters, persistent buffers, and extra state."""
        self.kept_buffers.put_back()
        return dict(self.module.state_dict())

    def arrangement(self) -> dict[str, Any]:
        """Return what ``tensors`` omits and an exact resume needs.

        Returns:
            ``strides`` of the tensors that are not row-major, since kernels choose by the memory layout, and
            ``buffers`` that are not persistent, or None at present. By their names in the wrapped module.
        """
        self.kept_buffers.put_back()
        buffers = {
            name: module._buffers[key]
            for name, module, key in self._buffers_by_name()
            if module._buffers[key] is None or key in module._non_persistent_buffers_set
        }
        return {"strides": unusual_strides(self._named_tensors()), "buffers": buffers}

    def load(self, tensors: Mapping[str, Any], arrangement: Mapping[str, Any] | None = None) -> None:
        """Load what ``tensors`` returned.

        Args:
            tensors: Values by name.
            arrangement: What ``arrangement`` returned, if the values are those of this very model: then its buffers
                may have come, gone or changed their shapes since it was built.

        Raises:
            RuntimeError: The values do not fit.
        """
        own = self.module.state_dict()
        tensors = {name: place(value, own.get(name)) for name, value in tensors.items()}
        for tensor in self.module.parameters():
            if not is_sharded(tensor) and overlaps(tensor):
                tensor.data = tensor.data.clone()
        if arrangement is not None:
            self._load_buffers(arrangement["buffers"])
            self._add_buffers(tensors)
        for name, module, key in self._buffers_by_name():
            buffer, value = module._buffers[key], tensors.get(name)
            if value is not None and (arrangement is not None or (buffer is not None and buffer.shape == value.shape)):
                module._buffers[key] = self._destination_for(value, buffer)
        self.module.load_state_dict(tensors)

    def arrange(self, arrangement: Mapping[str, Any]) -> None:
        """Restore what ``arrangement`` returned; the values of ``tensors`` stay as they are."""
        self._load_buffers(arrangement["buffers"])
        lay_out(self._named_tensors(), arrangement["strides"])

    def copy(self) -> "ModelBase":
        """Return a copy that shares no memory; what was computed from parameters, as by weight norm, is detached."""
        self.kept_buffers.put_back()
        memo: dict[int, Any] = {}
        if self.copier is not None:
            memo[id(self.module)] = self.copier()
            memo |= {id(item): item for item in (self.copier, self.blank)}
        for module in self.modules():
            for value in (*vars(module).values(), *module._buffers.values()):
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
        return deepcopy(self, memo)

    def plain_copy(self, world: World) -> nn.Module | None:
        """Return a copy of the wrapped module on the CPU, with whole tensors; None on a rank that does not record.

        Args:
            world: The ranks of the run. Where the module is spread over them, all of them call this.

        Raises:
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        if self.blank is None:
            return self.copy().module.cpu() if world.records else None
        self.kept_buffers.put_back()
        module = self.blank().to_empty(device="cpu") if world.records else None
        own = [] if module is None else list(module.parameters())
        with torch.no_grad():
            for index, parameter in enumerate(self.module.parameters()):
                value = gathered(parameter, world)
                if module is not None:
                    own[index].copy_(value)
        if module is not None:
            copy_rest(self.module, module, torch.device("cpu"))
        return module

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors whose memory layout is theirs to choose; a piece of one is always row-major."""
        # In the order of named_parameters and named_buffers, with one walk instead of one for each of them.
        modules = [(f"{prefix}.".lstrip("."), module) for prefix, module in self.module.named_modules()]
        parameters = ((prefix, module._parameters) for prefix, module in modules)
        buffers = ((prefix, module._buffers) for prefix, module in modules)
        seen: set[int] = set()
        for prefix, tensors in chain(parameters, buffers):
            for key, tensor in tensors.items():
                if tensor is not None and id(tensor) not in seen and not is_sharded(tensor):
                    seen.add(id(tensor))
                    yield prefix + key, tensor

    def _buffers_by_name(self) -> list[tuple[str, nn.Module, str]]:
        return [
            (f"{prefix}.{key}".lstrip("."), module, key)
            for prefix, module in self.module.named_modules()
            for key in module._buffers
        ]

    def _load_buffers(self, buffers: Mapping[str, Tensor | None]) -> None:
        for name, module, key in self._buffers_by_name():
            if name in buffers:
                value = buffers[name]
                destination = None if value is None else self._destination_for(value, module._buffers[key])
                module._buffers[key] = None if destination is None or value is None else destination.copy_(value)

    def _add_buffers(self, tensors: Mapping[str, Any]) -> None:
        """Register buffers that the stored model registered in a forward pass."""
        modules, known = dict(self.module.named_modules()), self.module.state_dict()
        for name in tensors.keys() - known.keys():
            prefix, _, key = name.rpartition(".")
            if prefix in modules and not hasattr(modules[prefix], key) and isinstance(tensors[name], Tensor):
                modules[prefix].register_buffer(key, self._destination_for(tensors[name], None))

    def _destination_for(self, value: Tensor, buffer: Tensor | None) -> Tensor:
        """Return the buffer if the value can be copied into it, else a new one that holds the value."""
        if buffer is None or not same_form(buffer, value) or overlaps(buffer) or value.layout != torch.strided:
            return value.to(self.device if buffer is None else buffer.device, copy=True)
        return buffer
