"""The optimizers of a run, one or several: their schedules, their options and their state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ksuit_runner.config.construct import constructing
from ksuit_runner.config.types import check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.errors import CheckpointError, ConfigError, KsuitError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.schedule import Paced, Schedule
from ksuit_runner.trainer.build_optimizer import build_optimizer
from ksuit_runner.trainer.build_schedule import build_schedule, follow_new_length
from ksuit_runner.trainer.fused_kernels import may_fuse
from ksuit_runner.trainer.optimizer_member import Member
from ksuit_runner.trainer.optimizer_needs import needs_closure
from ksuit_runner.trainer.optimizer_specs import ONLY, OptimizerSpec, SharedSettings, assign_parameters, config_path
from ksuit_runner.trainer.optimizer_state import load_optimizer_state
from ksuit_runner.trainer.parameter_rules import ParameterRules, named_parameters
from ksuit_runner.trainer.turns import Turns

_SCHEDULED = {"lr": "schedule", "weight_decay": "weight_decay_schedule"}
"""Options that a schedule can set, and the name of that schedule in the config."""


class Optimizers:
    """The optimizers of a run, which step at the same update or take turns.

    Every schedule advances at every update, whoever's turn it is: one clock for all of them.

    Args:
        members: The optimizers by name; a run's only one is named ``ONLY``.
        turns: Names of those that step at one update after the other; None if all of them step at every update.

    Attributes:
        members: The optimizers by name.
        parameters: Those of all optimizers.
        turns: Knows whose turn it is.
        evaluate_again: Whether one of them asks for evaluations of the loss.

    Raises:
        ConfigError: The turns name another optimizer, or leave one out.
    """

    def __init__(self, members: Mapping[str, Member], turns: Sequence[str] | None = None) -> None:
        self.members = dict(members)
        self.parameters = [item for member in members.values() for item in member.parameters]
        self.turns = Turns(members, turns)
        self.evaluate_again = any(member.evaluates_again for member in members.values())
        self._schedules = [item for member in members.values() for item in member.schedules.values()]
        self._used: list[Sequence[Any]] = []  # values of _SCHEDULED by group

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

    # Schedules

    def advance(self) -> None:
        """Advance all schedules by one update."""
        self._used = [
            (group.get("lr"), group.get("weight_decay"))
            for member in self.members.values()
            for group in member.optimizer.param_groups
        ]
        for schedule in self._schedules:
            schedule.step()

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
        used = [values[list(_SCHEDULED).index(option)] for values in self._used]
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
    shared: SharedSettings,
    model: ModelBase,
    loss: nn.Module,
    counter: UpdateCounter,
    strategy: Strategy | None = None,
) -> Optimizers:
    """Build the optimizers of a run with their schedules.

    Args:
        specs: The optimizers by name; a run's only one is named ``ONLY``.
        shared: What they have in common.
        model: The model to train, on its device.
        loss: The loss module, whose parameters are trained as well.
        counter: Length of the run.
        strategy: How the ranks share the training; by default there is one.

    Raises:
        ConfigError: A parameter is matched by none of the optimizers or by two, or one of them does not fit.
    """
    strategy = strategy or Strategy()
    rules = {rule: options for rule, options in (shared.rules or {}).items() if options is not None}
    members = {}
    for name, chosen in assign_parameters(specs, named_parameters(model.module, loss)).items():
        spec, path = specs[name], config_path(name)
        check_numbers("PositiveFloat", path, clip_norm=spec.clip_norm, clip_value=spec.clip_value)
        optimizer = build_optimizer(
            *(spec.build, model.module, rules, model.device, loss),
            trains=counter.end_update > 0,
            lr_scale=shared.lr_scale,
            only=chosen,
            path=path,
        )
        evaluates_again = needs_closure(spec.build, optimizer)
        if evaluates_again and len(specs) > 1 and shared.turns is None:
            kind = type(optimizer).__name__
            raise ConfigError(f"{kind} evaluates the loss again, and needs turns of its own: trainer.turns", path=path)
        if strategy.is_sharded:
            _check_sharded(spec.build, optimizer, evaluates_again, path)
        base_rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
        members[name] = Member(
            optimizer,
            evaluates_again,
            _build_schedules(spec, shared, optimizer, counter, path),
            spec.clip_norm,
            spec.clip_value or shared.clip_value,
            strategy,
            _configured_rates(optimizer, rules, shared.lr_scale, path),
            base_rates,
        )
    return Optimizers(members, shared.turns)


def _configured_rates(optimizer: Optimizer, rules: ParameterRules, scale: float, path: str) -> dict[str, float]:
    """Return the learning rates of an optimizer, and of those of its rules that have their own, by config path."""
    labels = [label for group in optimizer.param_groups for label in group["name"].split("+")]
    found = {f"{path}.lr": float(optimizer.defaults["lr"]) / scale} if "lr" in optimizer.defaults else {}
    for rule, options in rules.items():
        if "lr" in options and any(label == rule or label.startswith(f"{rule}.") for label in labels):
            found[f"trainer.parameter_rules.{rule}.lr"] = float(options["lr"])
    return found


def _build_schedules(
    spec: OptimizerSpec, shared: SharedSettings, optimizer: Optimizer, counter: UpdateCounter, path: str
) -> dict[str, Schedule]:
    schedules = {}
    updates_per_epoch = counter.updates_per_epoch if counter.has_epochs else None
    for option, kind in _SCHEDULED.items():
        own = getattr(spec, kind)
        build, where = (own, f"{path}.{kind}") if own else (getattr(shared, kind), kind)
        if build is not None:
            with constructing(where):
                schedules[kind] = build_schedule(
                    build, optimizer, max(1, counter.end_update), updates_per_epoch, option, where
                )
    return schedules


def _check_sharded(factory: Callable[..., Optimizer], optimizer: Optimizer, evaluates_again: bool, path: str) -> None:
    """Check that an optimizer can train parameters that are spread over the ranks."""
    name, parameters = type(optimizer).__name__, [item for group in optimizer.param_groups for item in group["params"]]
    if evaluates_again:
        raise ConfigError(f"{name} evaluates the loss again, which strategy=fsdp does not: strategy=ddp", path=path)
    if any(group.get("fused") for group in optimizer.param_groups) and not may_fuse(factory, parameters):
        raise ConfigError(f"torch has no fused kernel of {name} for strategy=fsdp: leave it out", path=f"{path}.fused")
