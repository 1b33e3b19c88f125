"""Parameters, gradients and optimizer state spread over the ranks: PyTorch's FSDP2."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.modules.batchnorm import _BatchNorm

from ksuit_runner.config.types import PositiveInt
from ksuit_runner.distributed.fsdp_exchange import AllGather, ReduceScatter
from ksuit_runner.distributed.fsdp_units import check_parameters, unit_names
from ksuit_runner.distributed.part_tree import Node
from ksuit_runner.distributed.pieces import is_sharded, local
from ksuit_runner.distributed.prepare_model import share_weights, synchronize_batchnorm
from ksuit_runner.distributed.ranks import Ranks, all_gather
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.module_tree import copy_rest
from ksuit_runner.tensors.nested import tensors_in

_COPY, _SHARD = "copy", "shard"  # dimensions of the mesh of ranks


class ShardedParallel(Strategy):
    """Every rank holds a part of each parameter, and trains on its own parts of the batch: ``strategy=fsdp``.

    The model is cut into units. Before a unit computes, its parameters are gathered from all ranks, and freed again
    after it; in the backward pass its gradients are added up over the ranks, and each rank keeps those of its part. So
    the memory for parameters, gradients and optimizer state is divided by the number of ranks.

    Source: Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, 2023,
    https://arxiv.org/abs/2304.11277, in its second version, ``torch.distributed.fsdp.fully_shard``.

    Args:
        world: The processes that train the run together.
        units: Patterns of the names of the modules that are units; ``{}`` stands for the number of a layer. What is in
            none of them forms one more unit. By default they are the children of the largest list of modules.
        reshard_after_forward: Free the parameters of a unit after its forward pass, and gather them again for its
            backward pass; without that, they stay until after it.
        replicas: Number of groups of ranks that each hold all parameters; gradients are also added up over these. As
            many as there are machines keeps what is gathered within a machine.
        gather: ``precision`` gathers the parameters, and computes, in ``trainer.precision``; ``float32`` gathers them
            as they are, and leaves it to autocast, as with the other strategies.
        sync_batchnorm: Normalize by the statistics of all ranks, see ``synchronize_batchnorm``.

    Raises:
        ConfigError: The ranks cannot be divided into so many replicas, or this version of torch lacks something.
    """

    name = "fsdp"

    def __init__(
        self,
        world: World | None = None,
        units: Sequence[str] | None = None,
        reshard_after_forward: bool = True,
        replicas: PositiveInt = 1,
        gather: Literal["precision", "float32"] = "precision",
        sync_batchnorm: bool = False,
    ) -> None:
        super().__init__(world)
        if replicas < 1 or self.world.size % replicas:
            raise ConfigError(
                f"the {self.world.size} ranks cannot be divided into {replicas} groups of the same size",
                path="strategy.replicas",
            )
        if gather not in ("precision", "float32"):
            raise ConfigError(f"precision or float32 is needed, not {gather!r}", path="strategy.gather")
        if not has_fsdp():
            raise ConfigError(f"torch {torch.__version__} is too old for it: update torch, or use ddp", path="strategy")
        self._sync_batchnorm = sync_batchnorm
        self._units, self._reshard, self._replicas, self._gather = units, reshard_after_forward, replicas, gather
        self._mesh: DeviceMesh | None = None
        self._device = torch.device("cpu")
        self._modules: list[Any] = []  # the units, and the whole
        self._all_gather: Callable[..., Any] = all_gather
        self._is_in_sync = True
        self._outputs: list[Tensor] = []  # of the last forward pass of the model, until its backward pass

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are spread over the ranks: over more than one."""
        return self.world.size > 1

    def wrap(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Cut a model into units and keep this rank's part of its parameters; see ``Strategy.wrap``.

        Raises:
            ConfigError: A pattern matches no module, or FSDP2 cannot train the model.
        """
        if self.world.size == 1:
            return
        # Whatever follows a model here leaves its outputs as they are.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        share_weights(model, self.world)
        if self._sync_batchnorm:
            synchronize_batchnorm(model)
        inner: nn.Module = model.get_submodule("module")
        names = unit_names(inner, self._units)
        check_parameters(inner, names)
        self._device = next((item.device for item in inner.parameters()), torch.device("cpu"))
        self._mesh = _mesh(self._device, self.world.size, self._replicas)
        if self._device.type == "cpu" and isinstance(self.world, Ranks):
            self._all_gather = AllGather(self.world)
        template = _template(inner)
        self._modules = self._shard(inner, names, dtype)
        _initialize(self._modules)
        inner.register_forward_hook(self._note)
        model.copier = partial(self._copy, template, inner, names, dtype)  # type: ignore[assignment]
        model.blank = partial(deepcopy, template)  # type: ignore[assignment]

    def compile(self, model: nn.Module, mode: str | None = None) -> None:
        """Compile every unit by itself: what is exchanged between them cannot be."""
        if self.world.size == 1:
            super().compile(model, mode)
            return
        units = [module for module in self._modules[:-1] if not isinstance(module, _BatchNorm)]
        for module in units or self._modules[-1:]:
            module.compile(mode=mode)

    def before_backward(self, is_last: bool) -> None:
        """Prepare for a backward pass: gradients are added up over the ranks in the last one of an update only."""
        self._outputs = []
        if is_last is not self._is_in_sync:
            self._is_in_sync = is_last
            for whole in self._modules[-1:]:
                whole.set_requires_gradient_sync(is_last)
                whole.set_is_last_backward(is_last)

    def nothing(self, loss: Tensor) -> Tensor:
        """Return 0 times the outputs of the model: nothing behind them can make their gradients NaN."""
        if not self._outputs:  # only units of the model were called
            return super().nothing(loss)
        return torch.stack([(output * 0.0).sum().float() for output in self._outputs]).sum()

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return what this rank holds of parameters or their gradients, see ``Strategy.local``."""
        return [local(tensor) for tensor in tensors]

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """Return the Euclidean norms of the whole tensors, see ``Strategy.norms``."""
        norms: Tensor = torch.linalg.vector_norm(self._norms_of_pieces(tensors), 2.0, dim=0)
        return norms.float()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the Euclidean norm of the whole gradients, see ``Strategy.norm``."""
        norm: Tensor = torch.linalg.vector_norm(self._norms_of_pieces(gradients), 2.0)
        return norm.float()

    def _norms_of_pieces(self, tensors: list[Tensor]) -> Tensor:
        """Return the norms of what each rank holds, of shape (ranks, tensors); what all of them hold counts once.

        In double precision, they do not tell where the tensors are cut: the norm of the whole rounds to one number.
        """
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        own = torch.stack([torch.linalg.vector_norm(piece, 2.0, dtype=dtype) for piece in self.local(tensors)])
        if self._mesh is None:
            return own.unsqueeze(0)
        group = self._mesh.get_group(_SHARD)
        gathered = own.new_empty(dist.get_world_size(group) * len(own))
        self._all_gather(gathered, own, group=group)
        of_all = gathered.view(-1, len(own))
        if whole := [i for i, tensor in enumerate(tensors) if not is_sharded(tensor)]:
            of_all[1:, whole] = 0.0
        return of_all

    def reduce(
        self, nodes: Mapping[Node, Sequence[Tensor | None]], parts: int, word: Sequence[float]
    ) -> tuple[list[Tensor | None], list[float]]:
        """Exchange the word, and what the backward pass does not add up; see ``Strategy.reduce``."""
        if self.world.size == 1:
            return super().reduce(nodes, parts, word)
        [gradients] = nodes.values()
        whole = [i for i, gradient in enumerate(gradients) if gradient is not None and not is_sharded(gradient)]
        said = self.world.gather([list(word), whole])
        totals = [sum(numbers) for numbers in zip(*(numbers for numbers, _ in said), strict=True)]
        return self._completed(gradients, whole, [places for _, places in said]), totals

    def _completed(
        self, gradients: Sequence[Tensor | None], whole: Sequence[int], of_ranks: Sequence[Sequence[int]]
    ) -> list[Tensor | None]:
        """Return the gradients with the sums over the ranks of those that the backward pass does not add up.

        Args:
            gradients: Those of this rank.
            whole: Which of them it has wholly, as those of the loss.
            of_ranks: The same of every rank.
        """
        if not any(of_ranks):
            return list(gradients)
        tensors = self.world.gather_tensors([gradient for i in whole if (gradient := gradients[i]) is not None])
        sums: dict[int, Tensor] = {}
        for places, found in zip(of_ranks, tensors, strict=True):
            for i, gradient in zip(places, found, strict=True):
                sums[i] = sums[i] + gradient if i in sums else gradient
        return [sums[i].to(self._device) if i in sums else gradient for i, gradient in enumerate(gradients)]

    def reset(self) -> None:
        """Free what a forward or backward pass that has failed left behind; see ``Strategy.reset``."""
        with suppress(RuntimeError):  # the connection that it waits for may be broken
            for whole in self._modules[-1:]:
                if hasattr(whole, "reset_iter_state"):
                    whole.reset_iter_state()
        for module in self._modules:
            module.reshard()

    def _note(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            self._outputs = [output for output in tensors_in(outputs) if output.requires_grad]

    def _shard(self, inner: nn.Module, names: Sequence[str], dtype: torch.dtype) -> list[Any]:
        policy = fsdp.MixedPrecisionPolicy()
        if dtype is not torch.float32 and self._gather == "precision":
            policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        given: dict[str, Any] = {"mesh": self._mesh, "ignored_params": {p for p in inner.parameters() if p.ndim == 0}}
        units, full = [*map(inner.get_submodule, names), inner], fsdp.MixedPrecisionPolicy()
        # Batch normalization takes parameters of the type of its running statistics only.
        batchnorms = [item for item in inner.modules() if isinstance(item, _BatchNorm)]
        apart = [item for item in batchnorms if policy.param_dtype and item.affine and item not in units]
        modules: list[Any] = [*apart, *units]
        for module in modules:
            # What is computed last is needed first in the backward pass.
            reshard = self._reshard and module is not inner
            own = full if module in apart else policy
            fsdp.fully_shard(module, reshard_after_forward=reshard, mp_policy=own, **given)
        for module in modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if isinstance(self.world, Ranks) and self._device.type == "cpu":
                module.set_custom_all_gather(AllGather(self.world))
                module.set_custom_reduce_scatter(ReduceScatter(self.world, has_replicas=self._replicas > 1))
        inner.register_forward_hook(partial(_free_after_evaluation, modules))
        return modules

    def _copy(self, template: nn.Module, live: nn.Module, names: Sequence[str], dtype: torch.dtype) -> nn.Module:
        """Return a copy of the live module, spread over the ranks alike; torch refuses to copy one that is."""
        copy = deepcopy(template)
        modules = self._shard(copy, names, dtype)
        copy.to_empty(device=self._device)
        copy_rest(live, copy, self._device)
        _initialize(modules)
        with torch.no_grad():
            for own, other in zip(copy.parameters(), live.parameters(), strict=True):
                local(own).copy_(local(other))
                own.requires_grad_(other.requires_grad)
        return copy


def has_fsdp() -> bool:
    """Whether this version of torch has what ``strategy=fsdp`` needs of FSDP2."""
    needed = ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms", "set_custom_reduce_scatter")
    return all(hasattr(fsdp.FSDPModule, name) for name in needed)


def _mesh(device: torch.device, size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=(_SHARD,))
    return init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=(_COPY, _SHARD))


def _initialize(modules: Sequence[Any]) -> None:
    """Let torch do now what it does in the first forward pass, after which its tensors stay where they are.

    That is private; without it the parameters that are frozen in the first forward pass must not thaw in low precision.
    """
    state_of = getattr(fsdp.fully_shard, "state", None)
    initialize = getattr(state_of(modules[-1]), "_lazy_init", None) if state_of is not None else None
    if initialize is not None:
        initialize()


def _free_after_evaluation(modules: Sequence[Any], *_: Any) -> None:
    """Free what was gathered for a forward pass that no backward pass follows."""
    if not torch.is_grad_enabled():
        for module in modules:
            module.reshard()


def _template(inner: nn.Module) -> nn.Module:
    """Return a copy without memory: its parameters have no data, and its other tensors are those of the module."""
    memo: dict[int, Any] = {}
    for module in inner.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach()
    for item in inner.parameters():
        memo[id(item)] = nn.Parameter(torch.empty_like(item, device="meta"), requires_grad=item.requires_grad)
    return deepcopy(inner, memo)
