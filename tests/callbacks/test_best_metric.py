import logging
from functools import partial

import torch

from callbacks.accuracy import Accuracy
from callbacks.best_metric import BestMetric
from callbacks.loss import Loss
from callbacks.train_loss import TrainLoss

CALLBACKS = {
    "loss": partial(Loss, dataset_key="test", every_n_updates=2),
    "accuracy": partial(Accuracy, dataset_key="test", every_n_updates=3),
    "train_loss": partial(TrainLoss, every_n_updates=1),
    "best": partial(BestMetric, metric_key="loss/test", others=["accuracy/*", "loss/*"]),
}
# Such steps go too far now and then.
OPTIONS = {"optimizer": partial(torch.optim.SGD, lr=6.0), "max_updates": 20}


def test_the_values_of_all_are_those_at_the_best_moments(new_run):
    run = new_run(CALLBACKS, **OPTIONS).train()
    loss, accuracy, train = (run.metric(key) for key in ("loss/test", "accuracy/test", "loss/train"))
    best = [step for step in loss if loss[step] == min(value for at, value in loss.items() if at <= step)]
    assert 2 < len(best) < len(loss)
    assert run.metric("best/loss/test") == {step: loss[step] for step in best}
    assert run.metric("best/loss/train") == {step: train[step] for step in best}
    latest = {step: max(at for at in accuracy if at <= step) for step in best if step > 2}
    assert run.metric("best/accuracy/test") == {step: accuracy[at] for step, at in latest.items()}
    assert {key for key in run.metrics() if key.startswith("best/")} == {
        *("best/loss/test", "best/loss/train", "best/accuracy/test")
    }


def test_a_resumed_run_logs_the_same(new_run):
    whole = new_run(CALLBACKS, run_id="whole", **OPTIONS).train()
    new_run(CALLBACKS, run_id="cut", stop_at=7, **OPTIONS).train()
    resumed = new_run(CALLBACKS, run_id="cut", **OPTIONS).train()
    assert all(resumed.metric(key) == whole.metric(key) for key in whole.metrics())
    assert resumed["best"].state_dict() == whole["best"].state_dict()


def test_a_pattern_that_nothing_matched_is_told(new_run, caplog):
    others = ["acuracy/test", "loss/*", "iou*/*"]
    callbacks = {**CALLBACKS, "best": partial(BestMetric, metric_key="loss/test", others=others)}
    with caplog.at_level(logging.WARNING):
        new_run(callbacks, max_updates=2).train()
    assert "callbacks.best.others: no metric that was logged matches 'acuracy/test'" in caplog.text
    assert "iou" not in caplog.text  # a pattern for any run, beside one that has matched
    caplog.clear()
    callbacks = {**CALLBACKS, "best": partial(BestMetric, metric_key="loss/test", others=["iou*/*"])}
    new_run(callbacks, run_id="another", max_updates=2).train()
    assert "no metric that was logged matches 'iou*/*'" in caplog.text


def test_the_direction_of_its_metrics_is_that_of_theirs(new_run):
    properties = new_run(CALLBACKS)["best"].metric_property_provider
    assert properties.direction("best/loss/test") == "lower"
    assert properties.direction("best/accuracy/test") == "higher"
