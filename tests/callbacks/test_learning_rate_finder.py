import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from command import run_dir
from hydra.core.global_hydra import GlobalHydra
from torch.optim import SGD

from callbacks.learning_rate_finder import LearningRateFinder
from ksuit_runner.api import run
from ksuit_runner.errors import ConfigError
from ksuit_runner.schedule import constant, exponential
from ksuit_runner.trainer.optimizers import OptimizerSpec

FINDER = {"finder": partial(LearningRateFinder, smoothing=0.8)}
RISING = {
    "optimizer": partial(SGD, lr=1e-4),
    "schedule": partial(exponential, end_value=1e4),
    "max_updates": 60,
    "nan_loss": "warn",
}


def rows(finished):
    [table] = (finished.paths.artifacts_dir / "tables" / "finder").glob("*.json")
    return np.array(json.loads(table.read_text())["data"])


def test_it_ends_once_the_loss_has_diverged_and_shows_what_it_has_seen(new_run):
    finished = new_run(FINDER, **RISING).train()
    updates = finished.run.counter.update
    assert 20 < updates < 60
    rates, losses, smoothed = rows(finished).T
    assert rates == pytest.approx(1e-4 * 1e8 ** (np.arange(updates) / 59))
    assert smoothed == pytest.approx(pd.Series(losses).ewm(alpha=0.2).mean())
    assert smoothed[-1] > 4 * smoothed.min() and (smoothed[:-1] <= 4 * np.minimum.accumulate(smoothed)[:-1]).all()
    steepest = finished.metric("finder/steepest")[updates]
    assert rates[0] < steepest <= rates[smoothed.argmin()]
    assert finished.metric("finder/tenth_of_minimum")[updates] == rates[smoothed.argmin()] / 10
    assert list((finished.paths.artifacts_dir / "images").glob("finder*.png"))


@pytest.mark.parametrize("rate", ["steepest", "tenth_of_minimum"])
def test_rates_are_those_to_write_into_the_config(new_run, caplog, rate):
    rules = {
        "frozen": {"match": ["*.never"], "optional": True, "lr": 1.0},
        "bias": {"max_ndim": 1, "lr": 2e-5, "lr_factor": 3.0},
        "weight": {"min_ndim": 2, "lr_factor": 0.5},
    }
    given = {**RISING, "parameter_rules": rules, "reference_batch_size": 9}  # batches are 8 times as large
    with caplog.at_level("INFO", "ksuit_runner"):
        finished = new_run(FINDER, "finds", **given).train()
    update = finished.run.counter.update
    lr, own = (finished.metric(f"finder/{rate}{rule}")[update] for rule in ("", "/bias"))
    assert own == pytest.approx(lr / 5)
    assert f"finder/{rate}: optimizer.lr={lr:.3g} " in caplog.text
    assert f" trainer.parameter_rules.bias.lr={own:.3g}\n" in caplog.text
    assert f"finder/{rate}/frozen" not in finished.metrics()
    if rate == "steepest":  # written into a config, all groups have the rates that they had at that update
        number = rows(finished)[:, 0].tolist().index(lr)
        written = {**given, "optimizer": partial(SGD, lr=lr), "schedule": constant, "max_updates": 1}
        written["parameter_rules"] = {**rules, "bias": {**rules["bias"], "lr": own}}
        at_update = new_run({}, "there", stop_at=number + 1, **given).train().run.trainer.optimizers.used_options("lr")
        again = new_run({}, "again", **written).train().run.trainer.optimizers.used_options("lr")
        assert again == pytest.approx(at_update) and len(again) == 2


def test_a_resume_shows_the_same(new_run):
    whole = new_run(FINDER, **RISING).train()
    new_run(FINDER, "killed", stop_at=17, **RISING).train()
    resumed = new_run(FINDER, "killed", **RISING).train()
    assert (rows(resumed) == rows(whole)).all()
    assert resumed.metric("finder/steepest") == whole.metric("finder/steepest")


def test_the_loss_is_that_of_the_whole_batch(new_run):
    whole, parts = (new_run(FINDER, str(n), accumulation_steps=n, **RISING).train() for n in (1, 4))
    assert rows(parts)[:20] == pytest.approx(rows(whole)[:20], rel=1e-4)


def test_a_run_without_updates_has_nothing_to_show(new_run):
    assert new_run(FINDER, max_epochs=0).train().metrics() == set()


def test_the_range_test_is_one_word(tmp_path):
    GlobalHydra.instance().clear()
    result = run(["debug=learning_rate_finder", "data=diabetes", "tracker=noop", f"output_dir={tmp_path}"])
    assert result.status == "FINISHED" and 1e-6 < result.metrics["learning_rate_finder/steepest"].last < 1
    assert not list(run_dir(tmp_path).glob("artifacts/checkpoints/E1_*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smoothing": 1.0}, "smoothing: a number from 0 to below 1"),
        ({"diverged": 1.0}, "diverged: a number above 1 is needed"),
        ({}, "it keeps the losses of all 20000 updates: debug=learning_rate_finder makes a short run"),
    ],
)
def test_bad_arguments_are_refused(new_run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        new_run({"finder": partial(LearningRateFinder, **arguments)}, max_updates=20_000)


def test_a_rate_of_0_cannot_rise(new_run):
    with pytest.raises(ConfigError, match=r"optimizer\.lr: a learning rate of 0 cannot rise"):
        new_run(FINDER, optimizer=partial(SGD, lr=0.0), max_updates=9)


def test_it_is_for_one_optimizer(new_run):
    optimizers = {name: OptimizerSpec(partial(SGD, lr=0.1), match=[f"*.{name}"]) for name in ("weight", "bias")}
    with pytest.raises(ConfigError, match="there are weight, bias: which rate is to rise"):
        new_run(FINDER, optimizer=optimizers)
