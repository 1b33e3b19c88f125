import math
from functools import partial

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from ksuit_runner.errors import ConfigError
from ksuit_runner.schedule import constant, cosine, exponential, from_torch, linear, plateau


def make(schedule, total=10, rate=1.0, **arguments):
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    return optimizer, schedule(optimizer, total, **arguments)


def rates(schedule, total=10, **arguments):
    """Return the learning rate of each update, and the one after the last."""
    optimizer, scheduler = make(schedule, total, **arguments)
    found = []
    for _ in range(total + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


ALL = pytest.mark.parametrize("schedule", [constant, linear, cosine, partial(from_torch, scheduler="ConstantLR")])


@pytest.mark.parametrize("schedule", [constant, linear, cosine])
@pytest.mark.parametrize("warmup", [4, 0.4])
def test_the_warm_up_goes_up_along_a_line(schedule, warmup):
    found = rates(schedule, warmup=warmup, rate=2.0)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(found) == 2.0


def test_constant():
    assert rates(constant) == [1.0] * 11


def test_linear():
    assert rates(linear, end_factor=0.5) == pytest.approx([*(1 - update / 18 for update in range(10)), 0.5])
    assert rates(linear)[-2:] == [0, 0]


def test_cosine():
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * update / 9)) / 2 for update in range(10)]
    assert rates(cosine, end_factor=0.1) == pytest.approx([*expected, 0.1])
    assert rates(cosine, total=11, warmup=2)[6] == pytest.approx(0.5)


def test_exponential():
    assert rates(exponential, end_factor=1e-3) == pytest.approx([*(1e-3 ** (update / 9) for update in range(10)), 1e-3])
    rising = rates(exponential, end_value=100.0, total=3)
    assert rising == pytest.approx([1, 10, 100, 100])
    for arguments in ({"end_factor": 0.0}, {"end_value": 0.0}):
        with pytest.raises(ConfigError, match=f"schedule.{next(iter(arguments))}: a number above 0 is needed"):
            make(exponential, **arguments)


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_last_update_has_the_end_value(schedule, warmup):
    found = rates(schedule, end_factor=0.25, warmup=warmup)
    assert found[-2:] == [0.25, 0.25]
    assert 0.25 < found[-3] < found[warmup] == 1.0
    assert rates(schedule, rate=2.0, end_value=1e-3, warmup=warmup)[-2] == pytest.approx(1e-3)


def test_an_end_value_is_that_of_groups_without_a_factor():
    optimizer = two_groups()
    optimizer.defaults["lr"] = 0.1
    schedule = linear(optimizer, 3, end_value=0.01)
    schedule.step(), schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.003])


def test_cosine_is_that_of_torch():
    torchs = rates(partial(from_torch, scheduler="CosineAnnealingLR", arguments={"T_max": 9}))
    assert rates(cosine)[:10] == pytest.approx(torchs[:10])


@pytest.mark.parametrize("warmup", ["2 epochs", "6 updates", "5 updates", 6, 0.5])
def test_a_rate_that_changes_by_epochs_ends_with_its_end_value(warmup):
    found = rates(linear, total=12, interval="epoch", updates_per_epoch=3, end_factor=0.5, warmup=warmup)
    assert found[:12] == pytest.approx([1 / 3] * 3 + [2 / 3] * 3 + [1.0] * 3 + [0.5] * 3)


@pytest.mark.parametrize(("warmup", "length"), [("2 epochs", 6), ("0.5 epochs", 2), ("1 update", 1), (0.25, 3)])
def test_a_warm_up_is_given_in_epochs_updates_or_as_a_fraction(warmup, length):
    found = rates(constant, total=12, updates_per_epoch=3, warmup=warmup)
    assert found[:12] == pytest.approx([(update + 1) / (length + 1) for update in range(length)] + [1] * (12 - length))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": "epohc"}, r"schedule.interval: there is no 'epohc'. Did you mean 'epoch'\?"),
        ({"interval": "epoch"}, "schedule.interval: an epoch of this data has no known length"),
        ({"warmup": "2 epochs"}, "schedule.warmup: an epoch of this data has no known length"),
        ({"warmup": "2 seconds"}, "schedule.warmup: a fraction, .* such as '2 epochs' is needed, not '2 seconds'"),
        ({"end_value": 0.1, "rate": 0.0}, "schedule.end_value: a value of 0 cannot be changed"),
        ({"end_value": -0.1}, "schedule.end_value: a number of at least 0 is needed, not -0.1"),
        ({"end_factor": float("nan")}, "schedule.end_factor: a number of at least 0 is needed, not nan"),
    ],
)
def test_what_a_curve_cannot_do_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(linear, **arguments)


def test_a_scheduler_of_torch_may_be_stepped_by_epochs():
    arguments = {"step_size": 1, "gamma": 0.1}
    schedule = partial(from_torch, scheduler="StepLR", arguments=arguments, interval="epoch", updates_per_epoch=3)
    assert rates(schedule)[:10] == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001])
    assert rates(schedule, warmup=4)[:7] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.1])
    # A decay that falls into the warm-up is left out.


def observed(optimizer, schedule, values):
    """Return the rates of updates after each of which a value is observed."""
    found = []
    for update, value in enumerate(values, 1):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        schedule.observe(value, update)
    return found


def test_the_rate_is_reduced_when_the_metric_has_stopped_improving():
    optimizer, schedule = make(plateau, metric="loss/test", factor=0.5, patience=1, warmup=2)
    found = observed(optimizer, schedule, [9, 9, 3, 2, 2, 2, 2, 1, 1])
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.5, 0.5, 0.5])


def test_a_plateau_counts_each_update_once_also_over_a_checkpoint():
    values = [5, 5, 5, 4, 4, 4, 4]
    whole = observed(*make(plateau, metric="loss/test", factor=0.5, patience=1), values)
    optimizer, first = make(plateau, metric="loss/test", factor=0.5, patience=1)
    cut = observed(optimizer, first, values[:5])
    other, second = make(plateau, metric="loss/test", factor=0.5, patience=1)
    second.load_state_dict(first.state_dict())
    second.observe(4, 5)  # the hooks of this update were half done
    for update, value in enumerate(values[5:], 6):
        cut.append(other.param_groups[0]["lr"])
        second.step()
        second.observe(value, update)
    assert cut == whole
    assert min(whole) < 1


def test_a_longer_run_follows_the_curve_of_its_new_length():
    _, short = make(linear, total=10)
    for _ in range(5):
        short.optimizer.step()
        short.step()
    optimizer, long = make(linear, total=20)
    long.load_state_dict(short.state_dict())
    optimizer.step()
    long.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - 6 / 19)


def test_a_scheduler_of_torch_starts_after_the_warm_up():
    schedule = partial(from_torch, scheduler="StepLR", arguments={"step_size": 3, "gamma": 0.1})
    assert rates(schedule)[:7] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01])
    assert rates(schedule, warmup=3)[:10] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_the_length_of_the_run_is_known_to_a_scheduler_of_torch():
    arguments = {"start_factor": 1.0, "end_factor": 0.5, "total_iters": "total_updates"}
    found = rates(from_torch, scheduler="LinearLR", arguments=arguments, warmup=2)
    assert found[2] == pytest.approx(1.0)
    assert found[10] == pytest.approx(0.5)


def test_schedulers_that_do_not_end_in_lr_count_too():
    arguments = {"T_0": 5}
    found = rates(from_torch, scheduler="CosineAnnealingWarmRestarts", arguments=arguments)
    assert found[5] == found[0] == 1.0


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("SetpLR", r"schedule.scheduler: torch has no 'SetpLR'. Did you mean 'StepLR'\?"),
        ("LRScheduler", "torch has no 'LRScheduler'"),
        ("ReduceLROnPlateau", "schedule.scheduler: ReduceLROnPlateau steps with a metric"),
        ("LambdaLR", "schedule.scheduler: LambdaLR takes functions"),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_refused(scheduler, message):
    with pytest.raises(ConfigError, match=message):
        make(from_torch, scheduler=scheduler)


def test_a_wrong_argument_of_a_scheduler_is_named():
    with pytest.raises(ConfigError, match=r"schedule.arguments: .*step_siz"):
        make(from_torch, scheduler="StepLR", arguments={"step_siz": 3})


def test_a_value_that_a_scheduler_refuses_is_named():
    with pytest.raises(ConfigError, match=r"schedule.arguments: .*total_steps"):
        make(from_torch, scheduler="OneCycleLR", arguments={"max_lr": 1.0})


@ALL
def test_a_warm_up_is_not_negative(schedule):
    with pytest.raises(ConfigError, match=r"schedule.warmup"):
        make(schedule, warmup=-1)


@pytest.mark.parametrize("name", ["cosine", "StepLR"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_state_goes_through_a_checkpoint(tmp_path, name, warmup):
    """What torch stores must be read back without unpickling objects, and lead to the same rates."""
    schedule = cosine if name == "cosine" else partial(from_torch, scheduler=name, arguments={"step_size": 2})
    optimizer, scheduler = make(schedule, warmup=warmup)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    torch.save([scheduler.state_dict(), optimizer.state_dict()], tmp_path / "state")
    states = torch.load(tmp_path / "state", weights_only=True)
    other_optimizer, other = make(schedule, warmup=warmup)
    other_optimizer.load_state_dict(states[1])
    other.load_state_dict(states[0])
    for _ in range(4):
        for item in (optimizer, scheduler, other_optimizer, other):
            item.step()
        assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert isinstance(other, lr_scheduler.LRScheduler)


@pytest.mark.parametrize("kind", [constant, linear, cosine])
def test_the_quick_step_is_that_of_torchs_lambda_schedule(kind):
    (ours, first), (theirs, second) = (
        (optimizer, kind(optimizer, 20, warmup=3)) for optimizer in (two_groups(), two_groups())
    )
    for _ in range(22):
        first.step()
        lr_scheduler.LambdaLR.step(second)
        assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in theirs.param_groups]
        assert first.get_last_lr() == second.get_last_lr()
        assert first.state_dict() == second.state_dict()


def two_groups():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.03)]
    optimizer = SGD(groups)
    optimizer._opt_called = True
    return optimizer
