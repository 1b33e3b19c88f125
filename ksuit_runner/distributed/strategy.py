"""How the ranks of a run share its training; this one is for a single process."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ksuit_runner.distributed.part_tree import Node
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.device import choose_device, gpu_identity
from ksuit_runner.tensors.foreach import norms


class Strategy:
    """Trains with a single process: ``strategy=single``. Others derive from it.

    Args:
        world: The processes that train the run together.

    Attributes:
        world: The same.
        bound: Tensors like those that ``reduce`` gets.
    """

    name = "single"

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.bound: Sequence[Tensor] = ()

    def device(self, name: str) -> torch.device:
        """Return the device of this rank, see ``choose_device``.

        Raises:
            ConfigError: It is not available, or two ranks would share a GPU.
        """
        if self.world.size == 1:
            return choose_device(name)
        device = choose_device(name, self.world.local_rank)
        gpus = self.world.gather(gpu_identity(device))
        if len(shared := [rank for rank, gpu in enumerate(gpus) if gpu and gpus.count(gpu) > 1]) > 1:
            raise ConfigError(
                f"the ranks {', '.join(map(str, shared))} would share a GPU: start as many as there are, or write cpu",
                path="trainer.device",
            )
        return device

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are spread over the ranks, which exchange them, and gradients, in every pass.

        Then all ranks have to do the same number of forward and backward passes of a model, in the same order.
        ``before_backward`` is called before each backward pass, and ``reduce`` gets the gradients that the last one of
        an update has left at the parameters, as those of the only node.
        """
        return False

    def wrap(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Prepare a model, which is on its device with all its parameters, in place, before the optimizer is built.

        Args:
            model: The model of the run, with the ``module`` that computes.
            dtype: Type in which it computes.
        """

    def compile(self, model: nn.Module, mode: str | None = None) -> None:
        """Compile the forward pass of a module, which was wrapped, in a mode of ``torch.compile``."""
        model.compile(mode=mode)

    def before_backward(self, is_last: bool) -> None:
        """Prepare for the backward pass of a part of the batch, which may be the rank's last one in this update."""

    def nothing(self, loss: Tensor) -> Tensor:
        """Return a loss of 0 whose backward pass is that of a loss over nothing, which may be NaN."""
        return torch.nan_to_num(loss)

    def reset(self) -> None:
        """Forget the passes of an update that has failed."""

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return what this rank holds of parameters or their gradients, in the same memory."""
        return tensors

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """Return the Euclidean norm of each parameter, or dense gradient, of shape (tensors,); the same on every rank.

        Where they are spread over the ranks, all of these ask for it together.
        """
        return torch.stack(list(norms(tensors)))

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the Euclidean norm of all dense gradients together, a scalar; the same to the bit on every rank."""
        norm: Tensor = torch.linalg.vector_norm(self.norms(gradients), 2.0)
        return norm

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Take note of what ``reduce`` will get: the parameters, or other tensors like their gradients, in order."""
        self.bound = tensors

    def reduce(
        self, nodes: Mapping[Node, Sequence[Tensor | None]], parts: int, word: Sequence[float]
    ) -> tuple[list[Tensor | None], list[float]]:
        """Add up the gradients of all ranks, and what they have to say about this update.

        Args:
            nodes: Sums of the gradients of this rank's parts, by node of the tree of parts; no node if it has no part.
                In each, one entry for every parameter, in the same order on all ranks; None without a gradient.
            parts: Number of parts of the whole batch.
            word: Numbers that are summed up over the ranks.

        Returns:
            The gradients of the whole batch, and the sums of the word; both are the same to the bit on every rank. A
            gradient is None if no rank has one.

        Raises:
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        [gradients] = nodes.values()
        return list(gradients), list(word)
