from functools import partial

import pytest
import torch
from sklearn.metrics import accuracy_score

from callbacks.accuracy import Accuracy
from callbacks.ema import Ema
from callbacks.robustness import Robustness
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError

CALLBACK = partial(Robustness, dataset_key=["noisy", "dark", "test"], every_n_updates=10)


@pytest.fixture
def corrupted(digits):
    clean, generator = digits["test"], torch.Generator().manual_seed(0)
    noise = torch.randn(clean.inputs.shape, generator=generator)
    noisy = TensorDataset((clean.inputs + noise)[:150], clean.targets[:150], (10,))
    return {**digits, "noisy": noisy, "dark": TensorDataset(clean.inputs / 9, clean.targets, (10,))}


def test_each_dataset_counts_the_same_for_live_and_averaged_weights(new_run, corrupted):
    callbacks = {"ema": Ema, "hard": CALLBACK, "clean": partial(Accuracy, dataset_key="test", every_n_updates=10)}
    run = new_run(callbacks, datasets=corrupted, max_updates=10).train()
    for end, model in (("", run.model.module), ("/ema", run["ema"].models["ema"].module)):
        wanted = {}
        for key in ("noisy", "dark", "test"):
            with torch.no_grad():
                predictions = model(corrupted[key].inputs).argmax(1)
            wanted[key] = accuracy_score(corrupted[key].targets, predictions)
            assert run.metric(f"accuracy/{key}{end}") == {10: pytest.approx(wanted[key], abs=1e-12)}
        mean = sum(wanted.values()) / 3
        assert run.metric(f"accuracy/hard{end}") == {10: pytest.approx(mean, abs=1e-12)}
        assert min(wanted.values()) < mean < max(wanted.values())
    assert len(run.metrics()) == 8


def test_a_resumed_run_logs_the_same(new_run, corrupted):
    whole = new_run({"hard": CALLBACK}, run_id="whole", datasets=corrupted, max_updates=20).train()
    new_run({"hard": CALLBACK}, run_id="cut", datasets=corrupted, max_updates=20, stop_at=13).train()
    resumed = new_run({"hard": CALLBACK}, run_id="cut", datasets=corrupted, max_updates=20).train()
    assert list(whole.metric("accuracy/hard")) == [10, 20]
    assert all(resumed.metric(key) == whole.metric(key) for key in whole.metrics())


@pytest.mark.parametrize("keys", [[], ["test", "test"], "test"])
def test_a_list_of_different_datasets_is_needed(new_run, keys):
    with pytest.raises(ConfigError, match="dataset_key: a list of different datasets is needed"):
        new_run({"hard": partial(Robustness, dataset_key=keys, every_n_epochs=1)})


def test_a_dataset_that_is_not_there_is_named(new_run):
    run = new_run({"hard": partial(Robustness, dataset_key=["test", "nosy"], every_n_epochs=1)})
    with pytest.raises(ConfigError, match="there is no dataset 'nosy'"):
        run.train()
