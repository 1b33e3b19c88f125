from functools import partial

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from callbacks.ema import Ema
from callbacks.knn_probe import KnnProbe
from ksuit_runner.errors import ConfigError
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: at least 1 is needed"),
        ({"temperature": 0.0}, "a temperature above 0"),
        ({"fit_dataset_key": "test"}, "fit_dataset_key: a probe is scored on other samples than those of 'test'"),
        ({"layers": ["hiden.*"]}, r"callbacks\.knn\.layers: 'hiden\.\*' matches no layer"),
        ({"k": 101, "fit_batches": 1}, r"callbacks\.knn\.k: 101 is more than the 100 samples"),
    ],
)
def test_mistakes_are_named(new_run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        new_run({"knn": partial(PROBE, **arguments)}, **options()).train()
