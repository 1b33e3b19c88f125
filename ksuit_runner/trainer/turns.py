"""Whose step it is at which update, where the optimizers of a run take turns."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ksuit_runner.errors import ConfigError, KsuitError, did_you_mean
from ksuit_runner.trainer.optimizer_member import Member
from ksuit_runner.trainer.optimizer_specs import ONLY


class Turn(NamedTuple):
    """Those that step at an update, and what they step together.

    Attributes:
        name: Name of the one whose turn it is; None if all of them step.
        members: Those that step.
        parameters: Theirs, frozen ones included.
        clipped_together: Those of them without a limit of their own.
    """

    name: str | None
    members: tuple[Member, ...]
    parameters: list[nn.Parameter]
    clipped_together: list[nn.Parameter]

    def with_gradients(self) -> list[Member]:
        """Return the members that the scaler of float16 takes: not those whose parameters are all frozen at present."""
        return [member for member in self.members if any(item.grad is not None for item in member.parameters)]

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that get a gradient."""
        return [item for item in self.parameters if item.requires_grad]


class Turns:
    """Knows whose turn it is.

    Args:
        members: The optimizers by name; a run's only one is named ``ONLY``.
        names: Names of those that step at one update after the other, from the beginning again after the last; None if
            all of them step at every update.

    Attributes:
        are_taken: Whether the optimizers take turns.

    Raises:
        ConfigError: The names are those of other optimizers, or leave one out.
    """

    def __init__(self, members: Mapping[str, Member], names: Sequence[str] | None) -> None:
        if names is not None:
            _check(names, members)
        self.are_taken = names is not None
        self._parameters = [item for member in members.values() for item in member.parameters]
        self._cycle = [_turn(name, members) for name in names or (None,)]
        self._unseen = set(names or ())

    def at(self, update: int) -> Turn:
        """Return whose turn the update after so many updates is."""
        return self._cycle[update % len(self._cycle)]

    def drop_others(self, update: int) -> None:
        """Drop the gradients of the parameters whose turn it is not."""
        trained = set(map(id, self.at(update).trained()))
        for parameter in self._parameters:
            if id(parameter) not in trained:
                parameter.grad = None

    def check_gradients(self, update: int) -> None:
        """Check, in the first turn of each, that the loss depends on what is trained in it.

        Raises:
            KsuitError: It does not, and nothing would ever be trained.
        """
        turn = self.at(update)
        if turn.name in self._unseen and (trained := turn.trained()):
            if all(parameter.grad is None for parameter in trained):
                raise KsuitError(f"the loss depends on no parameter of '{turn.name}'", path="trainer.turns")
            self._unseen.discard(str(turn.name))


def _check(names: Sequence[str], members: Mapping[str, Member]) -> None:
    if ONLY in members:
        raise ConfigError("there is only one optimizer; several have names: optimizer.NAME", path="trainer.turns")
    for name in names:
        if name not in members:
            raise ConfigError(f"there is no optimizer '{name}'. {did_you_mean(name, members)}", path="trainer.turns")
    for name in members:
        if name not in names:
            raise ConfigError(f"the optimizer '{name}' never has its turn", path="trainer.turns")


def _turn(name: str | None, members: Mapping[str, Member]) -> Turn:
    stepping = tuple(members.values()) if name is None else (members[name],)
    parameters = [item for member in stepping for item in member.parameters]
    together = [item for member in stepping if member.clip_norm is None for item in member.parameters]
    return Turn(name, stepping, parameters, together)
