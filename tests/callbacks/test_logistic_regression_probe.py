import logging
from functools import partial

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from callbacks.logistic_regression_probe import LogisticRegressionProbe
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.mlp import Mlp

PROBE = partial(LogisticRegressionProbe, dataset_key="test", fit_dataset_key="train", every_n_updates=5)


def options():
    torch.manual_seed(0)
    return {"module": Mlp((1, 8, 8), (10,), hidden_dims=[16]), "max_updates": 5}


def test_it_is_what_scikit_learn_computes_of_scaled_features(new_run, digits):
    probe = partial(PROBE, layers=["hidden.0"], inverse_regularization=0.1)
    run = new_run({"probe": probe}, **options()).train()
    with torch.no_grad():
        fitted, scored = (
            run.model.module.hidden[0](digits[key].inputs.flatten(1)).double().numpy() for key in ("train", "test")
        )
    mean, deviation = fitted.mean(0), fitted.std(0)
    classifier = LogisticRegression(C=0.1, max_iter=1000)
    classifier.fit((fitted - mean) / deviation, digits["train"].targets)
    wanted = classifier.score((scored - mean) / deviation, digits["test"].targets)
    assert 0.8 < wanted < 1 and run.metrics() == {"logistic_regression_accuracy/test"}
    assert run.metric("logistic_regression_accuracy/test") == {5: pytest.approx(wanted, abs=0.003)}


def test_a_fit_that_has_not_converged_is_told(new_run, caplog):
    with caplog.at_level(logging.WARNING):
        new_run({"probe": partial(PROBE, max_iterations=2, fit_batches=1)}, **options()).train()
    assert "callbacks.probe.max_iterations: the fit has not converged in 2 iterations" in caplog.text


def test_mistakes_are_named(new_run):
    with pytest.raises(ConfigError, match="inverse_regularization: a number above 0 is needed"):
        new_run({"probe": partial(PROBE, inverse_regularization=0.0)}, **options())
    data = TensorDataset(torch.rand(6, 4), torch.rand(6, 4), (4,))
    given = {"datasets": {"train": data, "test": data}, "module": torch.nn.Linear(4, 4), "batch_size": 6}
    run = new_run({"probe": PROBE}, **given, max_updates=5, loss=torch.nn.MSELoss())
    message = r"callbacks\.probe: class indices of shape \(samples,\) are needed as targets, not a tensor"
    with pytest.raises(ConfigError, match=message):
        run.train()
