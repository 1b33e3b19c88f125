import pytest
import torch
from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.engine.loop import evaluate, train
from ksuit_runner.errors import ConfigError


class Notes(PeriodicCallback):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.updates, self.followed = [], []

    def _before_every_update(self, update_counter):
        if self.follows(update_counter):
            self.followed.append(update_counter.update + 1)

    def _periodic_callback(self, update_counter):
        self.updates.append(update_counter.update)


class Rows(DatasetCallback):
    """Notes the sizes of the batches it sees, with which models and in which mode; logs how many samples there were."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sizes, self.seen, self.sums = [], [], []

    def _process_batch(self, batch, models):
        assert not torch.is_grad_enabled()
        assert not any(model.training for model in models.values())
        self.sizes.append(len(batch[1]))
        self.sums.append(batch[0].double().sum().item())
        self.seen.append(list(models))

    def _process_results(self, update_counter):
        self.writer.add_scalar(self.metric_key("rows", ""), sum(self.sizes))
        self.sizes = []


@pytest.mark.parametrize(
    ("interval", "updates"),
    [
        ({"every_n_epochs": 1}, [3, 6]),
        ({"every_n_updates": 4}, [4, 8]),
        ({"every_n_samples": 13}, [3, 5, 7]),
        ({"at_start": True, "every_n_updates": 5, "every_n_epochs": 2}, [0, 5, 6]),
        ({"at_end": True, "every_n_updates": 5}, [5, 8]),
        ({"at_end": True, "every_n_updates": 4}, [4, 8]),
        ({"at_start": True}, [0]),
    ],
)
def test_the_interval_says_when(maker, interval, updates):
    run = maker.run({"notes": (Notes, interval)})
    train(run)
    notes = run.hooks.callbacks["notes"]
    assert notes.updates == updates
    assert notes.followed == [update for update in updates if update > 0]


@pytest.mark.parametrize("interval", [{}, {"every_n_epochs": 0}])
def test_an_interval_is_needed(maker, interval):
    with pytest.raises(ConfigError, match="every_n_epochs"):
        maker.run({"notes": (Notes, interval)})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_is_gone_through_once_for_each_evaluation(maker, num_workers):
    run = maker.run({"rows": (Rows, {"dataset_key": "test", "every_n_updates": 4})}, num_workers=num_workers)
    train(run)
    rows = run.hooks.callbacks["rows"]
    assert run.log_writer.summary["rows/test"].last == 7
    assert rows.seen == [[""]] * 4
    assert rows.sums[:2] == rows.sums[2:], "each evaluation sees the same augmented data"


class Sample(DatasetCallback):
    """Draws a number for each batch, as an evaluation of a generative model does."""

    def _process_batch(self, batch, models):
        self.drawn = torch.rand(()).item()

    def _process_results(self, update_counter):
        self.writer.add_scalar(f"drawn/{update_counter.update}", self.drawn)


def test_what_an_evaluation_draws_does_not_depend_on_workers_or_other_callbacks(maker):
    sample = (Sample, {"dataset_key": "train", "every_n_updates": 4})
    rows = (Rows, {"dataset_key": "test", "every_n_updates": 2})
    runs = [
        maker.run({"s": sample}, run_id="one"),
        maker.run({"r": rows, "s": sample}, run_id="two"),
        maker.run({"s": sample, "r": rows}, run_id="three", num_workers=2),
    ]
    for run in runs:
        train(run)
    drawn = [[run.log_writer.summary[f"drawn/{update}"].last for update in (4, 8)] for run in runs]
    assert drawn[0] == drawn[1] == drawn[2]


def test_all_offered_weights_are_evaluated(maker):
    run = maker.run({"rows": (Rows, {"dataset_key": "test", "every_n_updates": 8})})
    run.trainer.add_evaluation_model("ema", nn.Linear(4, 3).eval())
    train(run)
    assert run.hooks.callbacks["rows"].seen == [["", "ema"]] * 2


def test_evaluating_without_training(maker):
    run = maker.run({"rows": (Rows, {"dataset_key": "train", "every_n_updates": 99})})
    evaluate(run)
    assert run.log_writer.summary["rows/train"].last == 20
    assert run.counter.update == 0


def test_the_key_of_a_metric_says_which_weights(maker):
    rows = maker.run({"rows": (Rows, {"dataset_key": "test", "every_n_updates": 1})}).hooks.callbacks["rows"]
    assert rows.metric_key("accuracy", "") == "accuracy/test"
    assert rows.metric_key("accuracy", "ema") == "accuracy/test/ema"


def test_a_dataset_that_is_not_there_is_named(maker):
    run = maker.run({"rows": (Rows, {"dataset_key": "tset", "every_n_updates": 1})})
    with pytest.raises(ConfigError, match=r"there is no dataset 'tset'. Did you mean 'test'\?"):
        train(run)
