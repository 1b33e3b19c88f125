from functools import partial

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from ksuit_runner.errors import ConfigError
from ksuit_runner.schedule import cosine, linear
from ksuit_runner.trainer.build_schedule import build_schedule


def test_another_option_follows_any_schedule():
    optimizer = SGD(
        [{"params": [torch.zeros(1)], "weight_decay": decay} for decay in (0.1, 0.0)], 1.0, weight_decay=0.1
    )
    schedule = build_schedule(partial(cosine, end_value=0.4), optimizer, 3, option="weight_decay")
    state = schedule.state_dict()
    schedule.step(), schedule.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.0])
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}
    schedule.load_state_dict(state)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    with pytest.raises(ConfigError, match="schedule: SGD has no 'betas' that it could set"):
        build_schedule(cosine, optimizer, 3, option="betas")


class Own(lr_scheduler.ExponentialLR):
    """A schedule that wants to know how long the run is."""

    def __init__(self, optimizer, total_updates):
        super().__init__(optimizer, gamma=0.5 ** (1 / total_updates))


@pytest.mark.parametrize(
    ("factory", "rates"),
    [
        (partial(lr_scheduler.StepLR, step_size=2, gamma=0.5), [1.0, 1.0, 0.5, 0.5, 0.25]),
        (Own, [1.0, 0.5**0.25, 0.5**0.5, 0.5**0.75, 0.5]),
        (linear, [1.0, 2 / 3, 1 / 3, 0.0, 0.0]),
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps="total_updates", cycle_momentum=False), [0.04]),
    ],
)
def test_a_class_of_torch_an_own_one_and_a_function_may_be_the_schedule(factory, rates):
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = build_schedule(factory, optimizer, 4), []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(lr_scheduler.ReduceLROnPlateau, patience=3), "schedule: ReduceLROnPlateau steps with a metric"),
        (partial(lr_scheduler.StepLR, step_siz=3), "schedule: StepLR: .*step_siz"),
        (
            partial(lr_scheduler.LambdaLR, lr_lambda=1),
            "schedule: LambdaLR takes functions .* can build it",
        ),
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0), "schedule: OneCycleLR: .*total_steps.*total_updates stands for"),
    ],
)
def test_a_class_that_does_not_fit_is_refused(factory, message):
    with pytest.raises(ConfigError, match=message):
        build_schedule(factory, SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 4)


class Stepped:
    """Has no state that a checkpoint could hold."""

    def __init__(self, optimizer, total_updates):
        self.total_updates = total_updates

    def step(self):
        """Nothing."""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda optimizer, total_updates: None, "^schedule: it builds None, which has no step()"),
        (lambda optimizer, total_updates: 0.1, "^schedule: it builds a float, which has no step()"),
        (Stepped, "^schedule: it builds a Stepped, which has no state_dict()"),
    ],
)
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_what_builds_no_schedule_is_refused(factory, message, option):
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match=message):
        build_schedule(factory, optimizer, 4, option=option)
