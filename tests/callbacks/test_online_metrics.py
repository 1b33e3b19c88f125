from functools import partial

import pytest
import torch
from sklearn.metrics import f1_score, recall_score
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score, MulticlassRecall

from callbacks.online_metrics import OnlineMetrics
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import ConfigError

METRICS = {"f1": partial(MulticlassF1Score), "recall": partial(MulticlassRecall, average="none")}
KEYS = {f"{name}/train{end}" for name in ("f1", *(f"recall_{i}" for i in range(10))) for end in ("", "/epoch")}


class Recorder(CallbackBase):
    """Keeps predictions and targets of every update."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.seen.append((update_counter.update, outputs.argmax(1), batch[1]))

    def of(self, updates):
        """Return targets and predictions of some updates."""
        chosen = [(targets, predictions) for update, predictions, targets in self.seen if update in updates]
        return [torch.cat(items) for items in zip(*chosen, strict=True)]


@pytest.mark.parametrize("parts", [1, 3])
def test_they_are_what_scikit_learn_computes_of_all_batches(new_run, parts):
    callback = partial(OnlineMetrics, metrics=METRICS, every_n_updates=8, per_epoch=True)
    run = new_run({"online": callback, "seen": Recorder}, accumulation_steps=parts, max_updates=20).train()
    assert run.metrics() == KEYS
    of_interval = {end: run["seen"].of(range(end - 8, end)) for end in (8, 16)}
    for suffix, batches in (("", of_interval), ("/epoch", {20: run["seen"].of(range(20))})):
        wanted = {end: f1_score(*held, average="macro") for end, held in batches.items()}
        assert run.metric(f"f1/train{suffix}") == pytest.approx(wanted, rel=1e-6)
        wanted = {end: recall_score(*held, average=None)[3] for end, held in batches.items()}
        assert run.metric(f"recall_3/train{suffix}") == pytest.approx(wanted, rel=1e-6)


def test_a_resumed_run_logs_the_same_values_and_training_is_the_same_without(new_run):
    callbacks = {"online": partial(OnlineMetrics, metrics=METRICS, every_n_updates=8, per_epoch=True)}
    whole = new_run(callbacks, run_id="whole", max_updates=24).train()
    new_run(callbacks, run_id="cut", max_updates=24, stop_at=13).train()
    resumed = new_run(callbacks, run_id="cut", max_updates=24).train()
    assert whole.metrics() == KEYS
    assert all(resumed.metric(key) == whole.metric(key) for key in KEYS)
    alone = new_run({}, run_id="alone", max_updates=24).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


def test_what_would_hold_all_outputs_is_refused(new_run):
    make = partial(OnlineMetrics, every_n_updates=8)
    with pytest.raises(ConfigError, match=r"callbacks\.online\.metrics\.auroc: MulticlassAUROC would hold 'preds'"):
        new_run({"online": partial(make, metrics={"auroc": partial(MulticlassAUROC)})})
    binned = {"auroc": partial(MulticlassAUROC, thresholds=20)}
    run = new_run({"online": partial(make, metrics=binned)}, run_id="binned", max_updates=8).train()
    assert 0.5 < run.metric("auroc/train")[8] < 1


def test_two_that_log_other_values_under_one_name_are_found_before_training(new_run):
    make = partial(OnlineMetrics, metrics={"f1": partial(MulticlassF1Score)})
    with pytest.raises(ConfigError, match=r"callbacks\.one and callbacks\.two: both log 'f1/train' at update 6"):
        new_run({"one": partial(make, every_n_updates=2), "two": partial(make, every_n_updates=3)})


def test_a_metric_that_a_resume_changes_in_an_interval_begins_anew(new_run, caplog):
    make = partial(OnlineMetrics, every_n_updates=8, per_epoch=True)
    changed = {"f1": partial(MulticlassF1Score, average="micro"), "recall": METRICS["recall"]}
    new_run({"online": partial(make, metrics=METRICS)}, stop_at=13, max_updates=24).train()
    run = new_run({"online": partial(make, metrics=changed), "seen": Recorder}, max_updates=24, strict=False).train()
    assert "online has other arguments" in caplog.text
    targets, predictions = run["seen"].of(range(13, 16))
    assert run.metric("f1/train")[16] == pytest.approx(f1_score(targets, predictions, average="micro"), rel=1e-6)
