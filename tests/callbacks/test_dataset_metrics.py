from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn import metrics as reference
from torch import nn

from callbacks.dataset_metrics import DatasetMetrics
from callbacks.ema import Ema
from ksuit_runner.config.compose import shipped_conf
from ksuit_runner.data.diabetes import Diabetes
from ksuit_runner.data.digits import Digits
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.sgd import SgdTrainer


def shipped(name, **changes):
    """Return the metrics of a file of conf/callbacks/, with other arguments."""
    found, file = {}, shipped_conf() / "callbacks" / f"{name}.yaml"
    for key, node in OmegaConf.load(file)[name].metrics.items():
        node = dict(node)
        module, _, target = node.pop("_target_").rpartition(".")
        is_partial = node.pop("_partial_", False)
        made = partial(getattr(import_module(module), target), **{**node, **changes})
        found[key] = made if is_partial else made()
    return found


def scores_of(model, dataset):
    with torch.no_grad():
        return model.eval()(dataset.inputs).double()


def calibration_error(targets, scores, bins=15):
    """Guo et al., "On calibration of modern neural networks", 2017, equation 3."""
    confidence, predictions = scores.max(1)
    of_bin = np.digitize(confidence.numpy(), np.linspace(0, 1, bins + 1)[1:-1])
    error = 0.0
    for number in range(bins):
        inside = of_bin == number
        if inside.any():
            accuracy = (predictions == targets).numpy()[inside].mean()
            error += inside.mean() * abs(accuracy - confidence.numpy()[inside].mean())
    return error


def test_what_ships_is_what_scikit_learn_computes(new_run, digits):
    names = ("f1", "precision", "recall", "auroc", "calibration_error", "mean_iou")
    callbacks = {
        name: partial(DatasetMetrics, dataset_key="test", metrics=shipped(name), at_end=True) for name in names
    }
    each = partial(DatasetMetrics, dataset_key="test", metrics=shipped("recall", average="none"), at_end=True)
    run = new_run({"ema": Ema, **callbacks, "each": each}, max_updates=8).train()
    for weights, model in (("", run.model), ("/ema", run["ema"].models["ema"])):
        targets, scores = digits["test"].targets, scores_of(model, digits["test"]).softmax(1)
        predictions = scores.argmax(1)
        wanted = {
            "f1": reference.f1_score(targets, predictions, average="macro"),
            "precision": reference.precision_score(targets, predictions, average="macro", zero_division=0),
            "recall": reference.recall_score(targets, predictions, average="macro"),
            "auroc": reference.roc_auc_score(targets, scores, multi_class="ovr"),
            "calibration_error": calibration_error(targets, scores),
            "mean_iou": reference.jaccard_score(targets, predictions, average="macro"),
        }
        of_classes = reference.recall_score(targets, predictions, average=None)
        wanted |= {f"recall_{index}": value for index, value in enumerate(of_classes)}
        found = {name: run.metric(f"{name}/test{weights}") for name in wanted}
        assert found == {name: {8: pytest.approx(value, rel=1e-5)} for name, value in wanted.items()}
    assert len(run.metrics()) == 2 * len(wanted)


def test_errors_of_a_regression_are_those_of_scikit_learn(new_run):
    data = {"train": Diabetes("train"), "test": Diabetes("test")}
    callback = partial(
        DatasetMetrics, dataset_key="test", metrics=shipped("regression_errors"), batch_size=40, at_end=True
    )
    optimizer = partial(torch.optim.SGD, lr=0.01)
    run = new_run(
        {"errors": callback},
        module=nn.Linear(10, 1),
        datasets=data,
        loss=nn.MSELoss(),
        optimizer=optimizer,
        max_updates=20,
    ).train()
    targets, outputs = data["test"].targets, scores_of(run.model, data["test"])
    assert run.metric("mean_absolute_error/test")[20] == pytest.approx(reference.mean_absolute_error(targets, outputs))
    wanted = reference.root_mean_squared_error(targets, outputs)
    assert run.metric("root_mean_squared_error/test")[20] == pytest.approx(wanted)
    assert run.metric("r2_score/test")[20] == pytest.approx(reference.r2_score(targets, outputs), rel=1e-5)


class Masks(Digits):
    """Digits whose pixels are to be segmented into dark, gray and bright ones; nothing is known of the first column."""

    def __init__(self, split):
        super().__init__(split)
        self.targets = (self.inputs[:, 0] * 2.99).long()
        self.targets[:, :, 0] = 255
        del self.output_shape


def test_a_segmentation_by_the_path_of_its_output_without_a_known_number_of_classes(new_run):
    data = {"train": Masks("train"), "test": Masks("test")}

    class Segmentation(nn.Conv2d):
        def forward(self, x):
            return [None, {"masks": super().forward(x)}]

    class OfMasks(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            return super().forward(outputs[1]["masks"], targets)

    class Trainer(SgdTrainer):
        def training_step(self, batch, model):
            outputs = model(batch[0])
            return self.loss(outputs, batch[1]), outputs

    callback = partial(
        DatasetMetrics,
        dataset_key="test",
        metrics=shipped("mean_iou", ignore_index=255),
        outputs="1/masks",
        at_end=True,
    )
    run = new_run(
        {"iou": callback},
        module=Segmentation(1, 3, 3, padding=1),
        datasets=data,
        loss=OfMasks(ignore_index=255),
        trainer_class=Trainer,
        optimizer=partial(torch.optim.SGD, lr=5.0),
        max_updates=20,
    ).train()
    with torch.no_grad():
        predictions = run.model.eval()(data["test"].inputs)[1]["masks"].argmax(1)
    known = data["test"].targets != 255
    wanted = reference.jaccard_score(data["test"].targets[known], predictions[known], average="macro")
    assert 0.2 < wanted < 1
    assert run.metric("mean_iou/test") == {20: pytest.approx(wanted)}


def test_a_wrong_argument_is_found_before_training_and_wrong_targets_at_the_first_batch(new_run):
    with pytest.raises(ConfigError, match=r"callbacks\.f1\.metrics\.f1: ValueError: Unexpected .*averge"):
        new_run({"f1": partial(DatasetMetrics, dataset_key="test", metrics=shipped("f1", averge=1), at_start=True)})
    run = new_run(
        {"f1": partial(DatasetMetrics, dataset_key="test", metrics=shipped("regression_errors"), at_start=True)}
    )
    shapes = r"outputs float32 \(100, 10\) and targets int64 \(100,\)\ntorchmetrics says: "
    with pytest.raises(ConfigError, match=rf"callbacks\.f1\.metrics\.mean_absolute_error: .* does not take {shapes}"):
        run.train()


def test_a_segmentation_is_not_that_of_whole_samples_and_a_classification_not_that_of_numbers(new_run):
    iou = partial(DatasetMetrics, dataset_key="test", metrics=shipped("mean_iou"), per_pixel=True, at_end=True)
    with pytest.raises(ConfigError, match=r"callbacks\.iou: a class for each pixel .* not outputs float32 \(100, 10\)"):
        new_run({"iou": iou}).train()
    numbers = {"train": Diabetes("train"), "test": Diabetes("test")}
    f1 = partial(DatasetMetrics, dataset_key="test", metrics=shipped("f1"), at_end=True)
    with pytest.raises(ConfigError, match=r"f1: it is of classes, and outputs have one .* there is regression_errors"):
        new_run({"f1": f1}, "numbers", numbers, module=nn.Linear(10, 1), loss=nn.MSELoss())
