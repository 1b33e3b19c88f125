"""The optimizers of a run: one or several, each with its parameters and schedules, and whose turn it is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ksuit_runner.checkpoint.state_types import copy_state
from ksuit_runner.config.construct import constructing
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.pieces import is_sharded
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.errors import CheckpointError, ConfigError, KsuitError, did_you_mean
from ksuit_runner.schedule import Paced, Schedule, build_schedule, follow_new_length
from ksuit_runner.trainer.fused_adam import FusedStep
from ksuit_runner.trainer.gradients import clip_gradients, clip_values
from ksuit_runner.trainer.optimizer import (
    build_optimizer,
    load_optimizer_state,
    may_fuse,
    needs_closure,
    optimizer_state,
    switches_weights,
    without_loss,
)
from ksuit_runner.trainer.parameter_rules import hint, named_parameters, select_parameters


class SkippedEvaluation(Exception):
    """An optimizer evaluated the loss again, and it was not finite: the update is skipped."""


class Evaluation(Protocol):
    """Evaluates the loss of the batch again, and leaves its gradients at the parameters.

    Attributes:
        known: The loss at the weights as they are.
    """

    known: Tensor

    def __call__(self) -> Tensor:
        """Return the loss, a scalar."""


ONLY = ""
"""Name of a run's only optimizer."""

_SCHEDULED = ("lr", "weight_decay")
"""Options that a schedule can set."""


@dataclass(frozen=True)
class OptimizerSpec:
    """One of several optimizers: how it is built, over which parameters, and what it has of its own.

    Attributes:
        build: Builds the optimizer from parameters: a class of ``torch.optim`` with its arguments.
        match: Patterns of the names of its parameters.
        min_ndim: Smallest number of dimensions of its parameters.
        max_ndim: Largest number. Without any of these three it takes the parameters that the others leave.
        schedule: Builds its learning-rate schedule; None for that of the run.
        weight_decay_schedule: Builds the schedule of its weight decay; None for that of the run.
        clip_norm: Largest norm of its own gradients; None for that of the run, which is one of all gradients together.
        clip_value: Largest absolute value of an element of its gradients; None for that of the run.
    """

    build: Callable[..., Optimizer]
    match: Sequence[str] | None = None
    min_ndim: int | None = None
    max_ndim: int | None = None
    schedule: Callable[..., Schedule] | None = None
    weight_decay_schedule: Callable[..., Schedule] | None = None
    clip_norm: float | None = None
    clip_value: float | None = None

    @property
    def selectors(self) -> dict[str, Any]:
        """What selects its parameters."""
        given = {"match": self.match, "min_ndim": self.min_ndim, "max_ndim": self.max_ndim}
        return {name: value for name, value in given.items() if value is not None}


class Member:
    """An optimizer of a run.

    Args:
        optimizer: The optimizer.
        evaluates_again: Whether its step asks for evaluations of the loss, as a closure.
        schedules: What sets its options, by the name of the schedule in the config.
        clip_norm: Largest norm of its own gradients, or None.
        clip_value: Largest absolute value of an element of its gradients, or None.
        strategy: How the ranks share the training; by default there is one.

    Attributes:
        parameters: All that it trains, frozen ones included.
        grad_norm: Norm of its own gradients before clipping, if it has a ``clip_norm``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        evaluates_again: bool,
        schedules: Mapping[str, Schedule],
        clip_norm: float | None = None,
        clip_value: float | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self.optimizer, self.schedules, self.evaluates_again = optimizer, schedules, evaluates_again
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.parameters: list[nn.Parameter] = [item for group in optimizer.param_groups for item in group["params"]]
        self.grad_norm: Tensor | None = None
        self.switches_weights = switches_weights(optimizer)
        self.step = FusedStep(optimizer, (strategy or Strategy()).local)
        # Torch warns about a schedule that steps before the optimizer, as after a skipped update and in a fork. It sees
        # that by this attribute; a version without it warns, and no more.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        self.train()

    @property
    def is_at_rest(self) -> bool:
        """Whether all learning rates are 0, as at the end of a schedule: a line search divides by them."""
        return not any(group.get("lr", 1.0) for group in self.optimizer.param_groups)

    def train(self) -> None:
        """Switch to the weights that are trained."""
        if self.switches_weights:
            self.optimizer.train()  # type: ignore[attr-defined]

    def evaluate(self) -> None:
        """Switch to the weights that are evaluated."""
        if self.switches_weights:
            self.optimizer.eval()  # type: ignore[attr-defined]

    def snapshot(self) -> Callable[[], None]:
        """Return what undoes a step."""
        weights = [item.detach().clone() for item in self.parameters]
        state = copy_state("optimizer", optimizer_state(self.optimizer))

        @torch.no_grad()
        def restore() -> None:
            for parameter, values in zip(self.parameters, weights, strict=True):
                parameter.copy_(values)
            load_optimizer_state(self.optimizer, state)

        return restore

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, by parameter name, and of its schedules."""
        schedules = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        return {"optimizer": optimizer_state(self.optimizer), **schedules}

    def load_state_dict(self, state: Mapping[str, Any], updates: int, same_settings: bool, has_loss: bool) -> None:
        """Load a stored state, see ``Optimizers.load_state_dict``."""
        stored = state["optimizer"] if has_loss else without_loss(state["optimizer"])
        load_optimizer_state(self.optimizer, stored, with_options=same_settings)
        for name, schedule in self.schedules.items():
            if same_settings:
                schedule.load_state_dict(state[name])
                continue
            for _ in range(updates):
                schedule.step()


class _Turn(NamedTuple):
    """Those that step at an update, and what they step together."""

    name: str | None
    members: tuple[Member, ...]
    parameters: list[nn.Parameter]
    clipped_together: list[nn.Parameter]

    def with_gradients(self) -> list[Member]:
        """Return the members that the scaler of float16 takes: not those whose parameters are all frozen at present."""
        return [member for member in self.members if any(item.grad is not None for item in member.parameters)]


class Optimizers:
    """The optimizers of a run, which step at the same update or take turns.

    Every schedule advances at every update, whoever's turn it is: one clock for all of them.

    Args:
        members: The optimizers by name; a run's only one is named ``ONLY``.
        turns: Names of those that step at one update after the other, from the beginning again after the last; None if
            all of them step at every update.
        clip_norm: Largest norm of all gradients of an update together, without those that have a limit of their own.
        scaler: Scales the losses of float16.
        strategy: How the ranks share the training.

    Attributes:
        parameters: Those of all optimizers.
        has_turns: Whether they take turns.
        evaluate_again: Whether one of them asks for evaluations of the loss.
        grad_norm: Norm of the last update's gradients before they were clipped together, or None.

    Raises:
        ConfigError: The turns name another optimizer, or leave one out.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        turns: Sequence[str] | None,
        clip_norm: float | None,
        scaler: torch.amp.GradScaler,
        strategy: Strategy | None = None,
    ) -> None:
        self._strategy = strategy or Strategy()
        self.members = dict(members)
        self.parameters = [item for member in members.values() for item in member.parameters]
        self.grad_norm: Tensor | None = None
        self._clip_norm, self._scaler = clip_norm, scaler
        self._is_unscaled = False
        self._used: list[Sequence[Any]] = []  # values of _SCHEDULED by group
        self._schedules = [item for member in members.values() for item in member.schedules.values()]
        if turns is not None:
            _check_turns(turns, members)
        self.has_turns = turns is not None
        self.evaluate_again = any(member.evaluates_again for member in members.values())
        self._cycle = [_turn(name, members) for name in turns or (None,)]
        self._unseen = set(turns or ())

    @property
    def are_clipped(self) -> bool:
        """Whether gradients are clipped by their norm."""
        return self._clip_norm is not None or any(item.clip_norm is not None for item in self.members.values())

    @property
    def only(self) -> Member:
        """The only optimizer of the run.

        Raises:
            KsuitError: There are several.
        """
        if ONLY not in self.members:
            names = ", ".join(self.members)
            raise KsuitError(f"the run has several optimizers, trainer.optimizers.members: {names}", path="optimizer")
        return self.members[ONLY]

    def turn(self, update: int) -> str | None:
        """Return whose step the update after so many updates is; None if all of them step."""
        return self._cycle[update % len(self._cycle)].name

    def trained(self, update: int) -> list[nn.Parameter]:
        """Return the parameters that get a gradient in the update after so many updates."""
        return [item for item in self._cycle[update % len(self._cycle)].parameters if item.requires_grad]

    def drop_others(self, update: int) -> None:
        """Drop the gradients of the parameters whose turn it is not."""
        trained = set(map(id, self.trained(update)))
        for parameter in self.parameters:
            if id(parameter) not in trained:
                parameter.grad = None

    def check_gradients(self, update: int) -> None:
        """Check, in the first turn of each, that the loss depends on what is trained in it.

        Raises:
            KsuitError: It does not, and nothing would ever be trained.
        """
        turn = self._cycle[update % len(self._cycle)]
        if turn.name in self._unseen and (trained := self.trained(update)):
            if all(parameter.grad is None for parameter in trained):
                raise KsuitError(f"the loss depends on no parameter of '{turn.name}'", path="trainer.turns")
            self._unseen.discard(str(turn.name))

    def unscale(self, update: int) -> None:
        """Divide the gradients by the factor that keeps small ones in float16, unless that is done."""
        if self._scaler.is_enabled() and not self._is_unscaled:
            for member in self._cycle[update % len(self._cycle)].with_gradients():
                self._scaler.unscale_(member.optimizer)
            self._is_unscaled = True

    def step(self, update: int, again: Evaluation | None = None, can_skip: bool = False) -> None:
        """Clip the gradients, and change the weights by them.

        Args:
            update: Number of updates before this one.
            again: Evaluates the loss for those that ask for it; its gradients are clipped like the first ones.
            can_skip: Whether such an evaluation may turn out not to be finite.

        Raises:
            SkippedEvaluation: It is not; the step is undone.
        """
        turn = self._cycle[update % len(self._cycle)]
        self._clip(turn, update)
        if self._scaler.is_enabled():
            self._step_scaled(turn)
        else:
            for member in turn.members:
                if not member.evaluates_again or again is None:
                    member.step()
                elif not member.is_at_rest:
                    self._search(member, turn, update, again, can_skip)

    def skip(self, update: int) -> None:
        """Leave out the step of an update, whose gradients may have been unscaled for it."""
        if self._is_unscaled and self._cycle[update % len(self._cycle)].with_gradients():
            self._scaler.update()
        self._is_unscaled = False

    def _step_scaled(self, turn: _Turn) -> None:
        members = turn.with_gradients()
        for member in members:
            self._scaler.step(member.optimizer)
        if members:
            self._scaler.update()
        self._is_unscaled = False

    def _search(self, member: Member, turn: _Turn, update: int, again: Evaluation, can_skip: bool) -> None:
        # It asks first for the loss at the weights as they are, which is known; others may change them before that.
        known = [again.known] if type(member.optimizer) is LBFGS else []

        def closure() -> Tensor:
            if known:
                return known.pop()
            with torch.enable_grad():
                loss = again()
            self._clip(turn, update)
            return loss

        restore = member.snapshot() if can_skip else None
        try:
            member.optimizer.step(closure)  # type: ignore[arg-type]
        except SkippedEvaluation:
            assert restore is not None
            restore()
            raise

    def advance(self) -> None:
        """Advance all schedules by one update."""
        self._used = [
            (group.get("lr"), group.get("weight_decay"))
            for member in self.members.values()
            for group in member.optimizer.param_groups
        ]
        for schedule in self._schedules:
            schedule.step()

    def _clip(self, turn: _Turn, update: int) -> None:
        if self._clip_norm is not None:
            self.unscale(update)
        for member in turn.members:
            if member.clip_value is not None:
                self.unscale(update)
                clip_values(member.parameters, member.clip_value, self._strategy)
            if member.clip_norm is not None:
                self.unscale(update)
                member.grad_norm = clip_gradients(member.parameters, member.clip_norm, self._strategy)
        if self._clip_norm is not None and turn.clipped_together:
            self.grad_norm = clip_gradients(turn.clipped_together, self._clip_norm, self._strategy)

    # Schedules

    def metric_schedules(self) -> Iterator[Paced]:
        """Yield the schedules that step with a metric."""
        yield from (item for item in self._schedules if isinstance(item, Paced) and item.metric)

    def follow_new_length(self) -> None:
        """Set what the schedules set to its values in a run of another length than the stored one."""
        for schedule in self._schedules:
            follow_new_length(schedule)

    def options(self, option: str) -> dict[str, float]:
        """Return the values of an option, such as ``lr``, by ``GROUP``, or ``NAME/GROUP`` of several optimizers."""
        return {name: float(group[option]) for name, group in self._groups().items() if option in group}

    def used_options(self, option: str) -> dict[str, float]:
        """Return those that the last update has used, of an option that a schedule can set."""
        if not self._used:
            return self.options(option)
        used = [values[_SCHEDULED.index(option)] for values in self._used]
        return {name: float(value) for name, value in zip(self._groups(), used, strict=True) if value is not None}

    def _groups(self) -> dict[str, dict[str, Any]]:
        return {
            f"{name}/{group['name']}" if name != ONLY else group["name"]: group
            for name, member in self.members.items()
            for group in member.optimizer.param_groups
        }

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the only optimizer and its schedules, or those of several by name in ``optimizers``."""
        states = {name: member.state_dict() for name, member in self.members.items()}
        return {**states.get(ONLY, {"optimizers": states}), "used_options": [list(values) for values in self._used]}

    def load_state_dict(
        self, state: Mapping[str, Any], updates: int, same_settings: bool = True, has_loss: bool = True
    ) -> None:
        """Load a stored state.

        Args:
            state: Has what ``state_dict`` returned.
            updates: Number of updates up to it.
            same_settings: Whether to load options and schedules; others are advanced to the position.
            has_loss: Whether to load the state of the loss module's parameters.

        Raises:
            CheckpointError: The state belongs to other optimizers, or other parameters.
        """
        for member, stored in self._with_states(state):
            member.load_state_dict(stored, updates, same_settings, has_loss)
        self._used = state.get("used_options", []) if same_settings else []

    def evaluate_stored(self, state: Mapping[str, Any]) -> None:
        """Switch the weights, which are in place as a run has stored them, to those that its evaluations have seen.

        Args:
            state: Has what ``state_dict`` returned.

        Raises:
            CheckpointError: The state belongs to other optimizers, or other parameters.
        """
        for member, stored in self._with_states(state):
            load_optimizer_state(member.optimizer, stored["optimizer"])
            member.evaluate()

    def _with_states(self, state: Mapping[str, Any]) -> list[tuple[Member, Mapping[str, Any]]]:
        states = {ONLY: state} if "optimizer" in state else state["optimizers"]
        if states.keys() != self.members.keys():
            stored, own = (", ".join(names) or "one" for names in (states, self.members))
            raise CheckpointError(f"the checkpoint has the state of other optimizers: {stored}, not {own}", "optimizer")
        return [(member, states[name]) for name, member in self.members.items()]


def build_optimizers(
    specs: Mapping[str, OptimizerSpec],
    model: nn.Module,
    loss: nn.Module,
    device: torch.device,
    counter: UpdateCounter,
    scaler: torch.amp.GradScaler,
    schedule: Callable[..., Schedule],
    weight_decay_schedule: Callable[..., Schedule] | None = None,
    rules: Mapping[str, Mapping[str, Any] | None] | None = None,
    turns: Sequence[str] | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    *,
    lr_scale: float,
    strategy: Strategy | None = None,
) -> Optimizers:
    """Build the optimizers of a run with their schedules.

    Args:
        specs: The optimizers by name; a run's only one is named ``ONLY``.
        model: The module to train.
        loss: The loss module, whose parameters are trained as well.
        device: Device of the parameters.
        counter: Length of the run.
        scaler: Scales the losses of float16.
        schedule: Builds the learning-rate schedule of those without one of their own.
        weight_decay_schedule: Builds the schedule of the weight decay of those without one of their own, or None.
        rules: Options by parameter, see ``build_optimizer``; None takes a rule out.
        turns: Whose step it is at one update after the other, see ``Optimizers``.
        clip_norm: Largest norm of all gradients together.
        clip_value: Largest absolute value of an element of a gradient.
        lr_scale: Factor on all learning rates.
        strategy: How the ranks share the training; by default there is one.

    Raises:
        ConfigError: A parameter is matched by none of the optimizers or by two, or one of them does not fit.
    """
    named = named_parameters(model, loss)
    given = {rule: spec for rule, spec in (rules or {}).items() if spec is not None}
    members = {}
    for name, chosen in _assign(specs, named).items():
        spec, path = specs[name], f"optimizer.{name}".rstrip(".")
        optimizer = build_optimizer(
            spec.build, model, given, device, loss, counter.end_update > 0, lr_scale, chosen, path
        )
        of_all = {"schedule": schedule, "weight_decay_schedule": weight_decay_schedule}
        schedules = {}
        for kind, option in (("schedule", "lr"), ("weight_decay_schedule", "weight_decay")):
            own = getattr(spec, kind)
            if (build := own or of_all[kind]) is not None:
                where = f"{path}.{kind}" if own else kind
                per_epoch = counter.updates_per_epoch if counter.has_epochs else None
                with constructing(where):
                    schedules[kind] = build_schedule(
                        build, optimizer, max(1, counter.end_update), per_epoch, option, where
                    )
        limits = {"clip_norm": spec.clip_norm, "clip_value": spec.clip_value}
        check_positive(limits, path)
        evaluates_again = needs_closure(spec.build, optimizer)
        if evaluates_again:
            _check_again(type(optimizer).__name__, path, scaler, alone=len(specs) == 1 or turns is not None)
        if strategy is not None and strategy.is_sharded:
            _check_sharded(spec.build, optimizer, path, scaler, evaluates_again)
        value = spec.clip_value or clip_value
        members[name] = Member(optimizer, evaluates_again, schedules, spec.clip_norm, value, strategy)
    return Optimizers(members, turns, clip_norm, scaler, strategy)


def check_positive(limits: Mapping[str, float | None], path: str) -> None:
    """Check limits, by the name of the argument, below a config path.

    Raises:
        ConfigError: One of them is not positive.
    """
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise ConfigError(f"it must be positive, and is {limit}; null stands for none", path=f"{path}.{name}")


def _check_again(name: str, path: str, scaler: torch.amp.GradScaler, alone: bool) -> None:
    """Check that an optimizer can evaluate the loss again."""
    if scaler.is_enabled():
        raise ConfigError(f"float16 does not fit {name}, which evaluates the loss again", path="trainer.precision")
    if not alone:
        raise ConfigError(f"{name} evaluates the loss again, and needs turns of its own: trainer.turns", path=path)


def _check_sharded(
    factory: Callable[..., Optimizer],
    optimizer: Optimizer,
    path: str,
    scaler: torch.amp.GradScaler,
    evaluates_again: bool,
) -> None:
    """Check that an optimizer can train parameters that are spread over the ranks."""
    name, parameters = type(optimizer).__name__, [item for group in optimizer.param_groups for item in group["params"]]
    if evaluates_again:
        raise ConfigError(f"{name} evaluates the loss again, which strategy=fsdp does not: strategy=ddp", path=path)
    if any(group.get("fused") for group in optimizer.param_groups) and not may_fuse(factory, parameters):
        raise ConfigError(f"torch has no fused kernel of {name} for strategy=fsdp: leave it out", path=f"{path}.fused")
    if scaler.is_enabled() and len({is_sharded(item) for item in parameters}) > 1:
        raise ConfigError(
            "float16 does not fit strategy=fsdp where some parameters are not spread over the ranks: those of the loss "
            "and those without dimensions are not. Use bfloat16",
            path="trainer.precision",
        )


def _assign(specs: Mapping[str, OptimizerSpec], named: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Return the names of the parameters of each optimizer."""
    rest = [name for name, spec in specs.items() if not spec.selectors]
    if len(rest) > 1:
        raise ConfigError(
            f"it needs match, min_ndim or max_ndim, as optimizer.{rest[0]} takes what the others leave",
            path=f"optimizer.{rest[1]}",
        )
    found = {
        name: select_parameters(spec.selectors, named, f"optimizer.{name}") if spec.selectors else []
        for name, spec in specs.items()
    }
    owners: dict[str, list[str]] = {parameter: [] for parameter in named}
    for name, parameters in found.items():
        for parameter in parameters:
            owners[parameter].append(name)
    for parameter, names in owners.items():
        if len(names) > 1:
            raise ConfigError(f"'{names[0]}' and '{names[1]}' both match the parameter '{parameter}'", path="optimizer")
        if not names and not rest:
            raise ConfigError(
                f"none of {', '.join(specs)} matches the parameter '{parameter}'; one without match, min_ndim and "
                "max_ndim takes what the others leave",
                path="optimizer",
            )
        if not names:
            found[rest[0]].append(parameter)
    for name, parameters in found.items():
        if not parameters and named:
            raise ConfigError(
                f"it matches no parameter. {hint(specs[name].match, named)}", path=f"optimizer.{name}".rstrip(".")
            )
    return found


def _check_turns(turns: Sequence[str], members: Mapping[str, Member]) -> None:
    if ONLY in members:
        raise ConfigError("there is only one optimizer; several have names: optimizer.NAME", path="trainer.turns")
    for name in turns:
        if name not in members:
            raise ConfigError(f"there is no optimizer '{name}'. {did_you_mean(name, members)}", path="trainer.turns")
    for name in members:
        if name not in turns:
            raise ConfigError(f"the optimizer '{name}' never has its turn", path="trainer.turns")


def _turn(name: str | None, members: Mapping[str, Member]) -> _Turn:
    stepping = tuple(members.values()) if name is None else (members[name],)
    parameters = [item for member in stepping for item in member.parameters]
    together = [item for member in stepping if member.clip_norm is None for item in member.parameters]
    return _Turn(name, stepping, parameters, together)
