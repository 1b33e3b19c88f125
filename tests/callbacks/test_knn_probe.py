import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.ema import Ema
from callbacks.knn_probe import KnnProbe
from callbacks.loss import Loss
from ksuit_runner.errors import ConfigError
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.models.mlp import Mlp

PROBE = partial(KnnProbe, dataset_key="test", fit_dataset_key="train", every_n_updates=10)


def hidden(model, images):
    """The features of the only hidden layer."""
    with torch.no_grad():
        return model.hidden[0](images.flatten(1))


def accuracy_of(model, digits, k, temperature):
    """What scikit-learn says, whose cosine distance is one minus the similarity."""
    classifier = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    images, targets = digits["train"].inputs, digits["train"].targets
    classifier.fit(hidden(model, images), targets)
    return classifier.score(hidden(model, digits["test"].inputs), digits["test"].targets)


def options():
    torch.manual_seed(0)
    return {"module": Mlp((1, 8, 8), (10,), hidden_dims=[16]), "max_updates": 10}


def test_live_and_averaged_weights_as_scikit_learn_computes_them(new_run, digits):
    run = new_run({"ema": Ema, "knn": partial(PROBE, layers=["hidden.0"], k=7, temperature=0.1)}, **options()).train()
    assert run.metrics() == {"knn_accuracy/test", "knn_accuracy/test/ema"}
    for key, model in (("test", run.model.module), ("test/ema", run["ema"].models["ema"].module)):
        found = run.metric(f"knn_accuracy/{key}")[10]
        assert 0.5 < found < 1 and found == pytest.approx(accuracy_of(model, digits, 7, 0.1), abs=1e-9)


def test_several_layers_have_names_and_a_resume_changes_nothing(new_run):
    probe = {"knn": partial(PROBE, layers=["hidden.*", "head"], every_n_updates=5, fit_batches=3)}
    whole = new_run(probe, run_id="whole", **options()).train()
    assert whole.metrics() == {"knn_accuracy_hidden.0/test", "knn_accuracy_head/test"}
    new_run(probe, run_id="cut", stop_at=7, **options()).train()
    resumed = new_run(probe, run_id="cut", **options()).train()
    assert all(resumed.metric(key) == whole.metric(key) for key in whole.metrics())


def test_with_weights_of_a_checkpoint_both_datasets_have_its_features(new_run, digits):
    callbacks = {
        "loss": partial(Loss, dataset_key="test", every_n_updates=5),
        "worst": partial(BestCheckpoint, metric_key="loss/test"),
        "knn": partial(KnnProbe, dataset_key="test", fit_dataset_key="train", weights_of="worst", layers=["hidden.*"]),
    }
    downwards = MetricPropertyProvider(higher=["*loss*"], lower=[])
    run = new_run(callbacks, properties=downwards, **{**options(), "max_updates": 15}).train()
    early = new_run({}, run_id="early", **{**options(), "max_updates": 5}).train()
    assert run.metric("knn_accuracy/test/worst") == {15: accuracy_of(early.model.module, digits, 20, 0.07)}


def test_features_that_are_not_finite_have_no_accuracy(new_run):
    given = {**options(), "optimizer": partial(torch.optim.SGD, lr=float("inf")), "nan_loss": "warn"}
    run = new_run({"knn": PROBE}, **given).train()
    assert math.isnan(run.metric("knn_accuracy/test")[10])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: a whole number of at least 1 is needed"),
        ({"fit_batches": 0}, "fit_batches: a whole number of at least 1 is needed, not 0"),
        ({"temperature": 0.0}, "temperature: a number above 0 is needed"),
        ({"fit_dataset_key": "test"}, "fit_dataset_key: a probe is scored on other samples than those of 'test'"),
        ({"layers": ["hiden.*"]}, r"callbacks\.knn\.layers: 'hiden\.\*' matches no layer"),
        ({"k": 101, "fit_batches": 1}, "k: 101 is more than the 100 samples to fit to"),
    ],
)
def test_mistakes_are_named(new_run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        new_run({"knn": partial(PROBE, **arguments)}, **options()).train()
