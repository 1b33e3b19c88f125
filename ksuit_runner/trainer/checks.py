"""Checks of a trainer: that its arguments make sense, and that whatever is to be trained has an optimizer."""

from collections.abc import Collection

from torch import nn

from ksuit_runner.config.types import check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, KsuitError, counted
from ksuit_runner.trainer.parameter_rules import named_parameters


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
