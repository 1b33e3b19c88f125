from functools import partial

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from callbacks.online_accuracy import OnlineAccuracy
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.data.digits import Digits
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.linear import Linear

KEYS = {f"{metric}/train{suffix}" for metric in ("accuracy", "accuracy_top3") for suffix in ("", "/epoch")}


class Recorder(CallbackBase):
    """Keeps the scores and the targets of every update."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.seen.append((update_counter.update, outputs.detach(), batch[1]))

    def accuracy(self, updates, k):
        chosen = [(scores, targets) for update, scores, targets in self.seen if update in updates]
        scores, targets = (torch.cat(items) for items in zip(*chosen, strict=True))
        return top_k_accuracy_score(targets, scores, k=k, labels=range(10))


class Mixed(Digits):
    """Digits whose targets are probabilities."""

    def __getitems__(self, indices):
        images, targets = super().__getitems__(indices)
        return images, torch.nn.functional.one_hot(targets, 10) * 0.6 + 0.04


class Numbers(Digits):
    """Digits whose targets are numbers, one for each sample, as of a regression."""

    def __getitems__(self, indices):
        images, targets = super().__getitems__(indices)
        return images, targets.float()[:, None]


# 20 updates per epoch, of which the last has 70 samples instead of 72.
@pytest.mark.parametrize("parts", [1, 3])
def test_it_is_what_scikit_learn_computes_of_all_batches(new_run, parts):
    callback = partial(OnlineAccuracy, topk=[3, 1], every_n_updates=8, per_epoch=True)
    run = new_run({"online": callback, "seen": Recorder}, accumulation_steps=parts, max_updates=45).train()
    assert run.metrics() == KEYS
    for metric, k in (("accuracy", 1), ("accuracy_top3", 3)):
        wanted = {end: run["seen"].accuracy(range(end - 8, end), k) for end in (8, 16, 24, 32, 40)}
        assert run.metric(f"{metric}/train") == pytest.approx(wanted, rel=1e-6)
        wanted = {end: run["seen"].accuracy(range(end - 20, end), k) for end in (20, 40)}
        assert run.metric(f"{metric}/train/epoch") == pytest.approx(wanted, rel=1e-6)
        assert 0.3 < wanted[40] < 1


def test_a_resumed_run_logs_the_same_values_and_training_is_the_same_without(new_run):
    callbacks = {"online": partial(OnlineAccuracy, topk=[3, 1], every_n_updates=8, per_epoch=True)}
    whole = new_run(callbacks, run_id="whole", max_updates=24).train()
    new_run(callbacks, run_id="cut", max_updates=24, stop_at=13).train()
    resumed = new_run(callbacks, run_id="cut", max_updates=24).train()
    assert whole.metrics() == KEYS
    assert all(resumed.metric(key) == whole.metric(key) for key in KEYS)
    alone = new_run({}, run_id="alone", max_updates=24).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


def test_of_mixed_targets_the_most_probable_class_counts(new_run):
    callbacks = {"online": partial(OnlineAccuracy, every_n_updates=8)}
    data = {"train": Mixed("train"), "test": Digits("test")}
    mixed = new_run(callbacks, run_id="mixed", datasets=data, max_updates=8, optimizer=partial(torch.optim.SGD, lr=0.0))
    plain = new_run(callbacks, run_id="plain", max_updates=8, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert mixed.train().metric("accuracy/train") == plain.train().metric("accuracy/train")


def test_subsets_of_classes_and_a_target_to_ignore(new_run):
    heads = {"even": {"classes": [0, 2, 4, 6, 8]}, "all": {}}
    callbacks = {"online": partial(OnlineAccuracy, heads=heads, ignore_index=0, every_n_updates=8), "seen": Recorder}
    run = new_run(callbacks, max_updates=8).train()
    hits = torch.cat([scores.argmax(1) == targets for _, scores, targets in run["seen"].seen]).double()
    targets = torch.cat([targets for *_, targets in run["seen"].seen])
    assert run.metric("accuracy_even/train")[8] == pytest.approx(
        hits[(targets % 2 == 0) & (targets != 0)].mean().item()
    )
    assert run.metric("accuracy_all/train")[8] == pytest.approx(hits[targets != 0].mean().item())


def test_two_with_different_heads_log_beside_each_other(new_run):
    heads = {"even": {"even": {"classes": [0, 2, 4]}}, "odd": {"odd": {"classes": [1, 3, 5]}}}
    callbacks = {name: partial(OnlineAccuracy, heads=held, every_n_updates=8) for name, held in heads.items()}
    run = new_run(callbacks, max_updates=8).train()
    assert run.metrics() == {"accuracy_even/train", "accuracy_odd/train"}
    with pytest.raises(ConfigError, match=r"both log 'accuracy_even/train' at update 8"):
        new_run({**callbacks, "again": callbacks["even"]}, run_id="again")


def test_more_than_the_classes_is_an_error_at_the_first_update(new_run):
    with pytest.raises(ConfigError, match="topk: a whole number of at least 1"):
        new_run({"online": partial(OnlineAccuracy, topk=[0], every_n_updates=8)})
    run = new_run({"online": partial(OnlineAccuracy, topk=[11], every_n_updates=8)})
    with pytest.raises(ConfigError, match=r"callbacks\.online\.topk: 11 is more than the 10 classes"):
        run.train()


def test_a_regression_has_no_accuracy(new_run):
    data = {"train": Numbers("train"), "test": Digits("test")}
    run = new_run({"online": partial(OnlineAccuracy, every_n_updates=8)}, datasets=data, module=Linear((1, 8, 8), (1,)))
    with pytest.raises(
        ConfigError, match=r"callbacks\.online: scores of shape .* and class indices .* are needed, not"
    ):
        run.train()
