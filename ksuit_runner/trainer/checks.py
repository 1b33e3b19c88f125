"""Checks of a trainer: what it overrides, whether its arguments make sense, and whether it trains all parameters."""

from collections.abc import Callable, Collection
from inspect import signature
from typing import Any

from torch import nn

from ksuit_runner.config.overridden import HOOKS_ELSEWHERE, check_overridden
from ksuit_runner.config.types import check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, KsuitError, counted
from ksuit_runner.trainer.parameter_rules import named_parameters

_OTHERWISE_NAMED = {"state_dict": "extra_state", "load_state_dict": "load_extra_state"}
_NOT_CALLED = {
    "split": "each part of a batch is fetched and collated by itself",
    "update": "the attribute of this name takes its place, so choose another one",
    **dict.fromkeys(
        (
            *("take_snapshot", "roll_back", "forward_part", "leaves_out", "backward", "complete_gradients"),
            *("start_again", "unscale_gradients", "optimizer_step", "skip_step"),
        ),
        "override `start_update` or `step`",
    ),
}
"""Methods that a subclass may mean to override, and what to do instead."""
_OVERRIDDEN = (
    *("training_step", "inputs_and_targets", "batch_size", "part_weight", "start_update"),
    *("extra_state", "load_extra_state", "merge_extra_states"),
)
"""What a method with nearly such a name is meant to be. Not ``weight`` and ``step``: ``weights`` may be another one."""
_ELSEWHERE = {
    **{name: f"a callback has a hook for it, '{hook}'" for name, hook in HOOKS_ELSEWHERE.items()},
    "on_save_checkpoint": "override 'extra_state'",
    "on_load_checkpoint": "override 'load_extra_state'",
    "compute_loss": "'training_step' returns the losses",
    "configure_optimizers": "the config has them, in 'optimizer' and 'schedule'",
    **dict.fromkeys(("validation_step", "test_step", "eval_step", "evaluation_step"), "callbacks evaluate"),
    **dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader"), "the config has datasets, in 'data'"),
}
"""Methods that the trainers of other frameworks call, and what to do here instead."""
_INDICES = ("batch_idx", "batch_index", "batch_nb", "batch_number", "idx", "index")
"""What the training steps of other frameworks get in the place of the model."""


def check_subclass(cls: type, trainer: type) -> None:
    """Check that a subclass of the trainer overrides what is meant to be overridden, when it is defined.

    Raises:
        TypeError: It overrides something else, has a method that nothing calls, or one that cannot be called like the
            trainer's own.
    """
    for name, instead in _OTHERWISE_NAMED.items():
        if getattr(cls, name) is not getattr(trainer, name):
            raise TypeError(f"{cls.__name__} overrides '{name}': override '{instead}' instead")
    for name, instead in _NOT_CALLED.items():
        if hasattr(cls, name):
            raise TypeError(f"{cls.__name__} has a method '{name}', which nothing calls: {instead}")
    for name in list(signature(cls.training_step).parameters)[2:3]:  # type: ignore[attr-defined]
        if name in _INDICES:
            raise TypeError(
                f"{cls.__name__}.training_step is called with the model to compute with, and not with '{name}'. Write: "
                "def training_step(self, batch, model)"
            )
    extra = {"training_step": 1}  # it may take the turn as well
    check_overridden(cls, hooks=(), extra=extra, others=_OVERRIDDEN, elsewhere=_ELSEWHERE)


def check_takes_turn(training_step: Callable[..., Any], name: str) -> None:
    """Check that a training step, which has this name in messages, can be told which optimizer's turn it is.

    Raises:
        ConfigError: It takes only a batch and a model.
    """
    if len(signature(training_step).parameters) < 3:
        raise ConfigError(f"{name} has to take a turn: training_step(batch, model, turn)", path="trainer.turns")


def check_parts(parts: int, ranks: int) -> None:
    """Check that the ranks of a run can share the parts of a batch.

    Raises:
        ConfigError: They cannot.
    """
    check_numbers("PositiveInt", "trainer", accumulation_steps=parts)
    if parts % ranks:
        path = "trainer.accumulation_steps"
        raise ConfigError(f"{counted(parts, 'part')} of a batch cannot be divided among {ranks} ranks", path=path)


def check_last_batch(counter: UpdateCounter, parts: int) -> None:
    """Check that every batch has something for every rank, where parameters are spread over ranks.

    Raises:
        ConfigError: The last one of an epoch has not.
    """
    last = counter.samples_per_epoch - (counter.updates_per_epoch - 1) * counter.batch_size
    if min(last, counter.batch_size) < parts:
        raise ConfigError(
            f"the last batch of an epoch has {counted(last, 'sample')}, and {parts} parts have one each where "
            "parameters are spread over ranks: data.drop_last=true leaves it out",
            path="trainer.accumulation_steps",
        )


def check_all_are_held(held: Collection[nn.Parameter], model: nn.Module, loss: nn.Module) -> None:
    """Check that the optimizers hold every parameter that is to be trained.

    Args:
        held: The parameters of all optimizers.
        model: The module to train.
        loss: The loss module.

    Raises:
        KsuitError: A parameter was replaced or added since the trainer was built, and would never be trained.
    """
    known = set(map(id, held))
    named = named_parameters(model, loss)
    lost = [name for name, item in named.items() if item.requires_grad and id(item) not in known]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise KsuitError(
            f"the optimizer does not have '{lost[0]}'{more}, replaced or added since training began: "
            "it would never be trained. Change the values of a parameter in place, or build the model that way",
            path="model",
        )
