import numpy as np
import pytest

from ksuit_runner.trainer.learning_rate_range import RangeTest, suggestions


def test_the_steepest_point_of_a_curve():
    logs = np.linspace(-6, 1, 200)
    losses = 3 - 2 / (1 + np.exp(-4 * (logs + 2.5)))  # a logistic function of the logarithm, around -2.5
    losses[180:] += 10 * (logs[180:] - logs[180])
    found = suggestions(10**logs, losses)
    assert np.log10(found["steepest"]) == pytest.approx(-2.5, abs=0.05)
    assert found["tenth_of_minimum"] == pytest.approx(10 ** logs[180] / 10)


@pytest.mark.parametrize(
    ("rates", "losses"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]),  # never falls
        ([3, 3, 3, 3], [4, 3, 2, 1]),  # the rate does not rise
        ([1, 2, 3], [np.nan] * 3),
    ],
)
def test_nothing_is_suggested_by_what_says_nothing(rates, losses):
    assert suggestions(np.array(rates, float), np.array(losses, float)) == {}


def test_the_mean_of_the_losses_is_that_of_a_weighted_average_from_the_first_one_on():
    seen, losses = RangeTest([], [], []), [4.0, 2.0, 1.0, 5.0]
    for update, loss in enumerate(losses):
        seen.add(10.0**update, loss, smoothing=0.8)
        weights = 0.8 ** np.arange(update, -1, -1)
        assert seen.smoothed[-1] == pytest.approx(np.average(losses[: update + 1], weights=weights))
    assert (seen.rates, seen.losses) == ([1.0, 10.0, 100.0, 1000.0], losses)


@pytest.mark.parametrize(
    ("losses", "diverged"), [([], False), ([3, 1, 4], False), ([3, 1, 4.1], True), ([np.nan], True)]
)
def test_it_has_diverged_above_a_multiple_of_the_lowest_mean(losses, diverged):
    seen = RangeTest([], [], [])
    for loss in losses:
        seen.add(1.0, loss, smoothing=0.0)
    assert seen.has_diverged(4.0) is diverged
