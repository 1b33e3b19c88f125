import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.ema import Ema
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError


class Named(TensorDataset):
    """Digits with names, of which every tenth has no label."""

    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "$9^$")

    def __init__(self, digits):
        targets = digits.targets.clone()
        targets[::10] = -1
        super().__init__(digits.inputs, targets, (10,))


def files(run, kind):
    return sorted((run.paths.artifacts_dir / kind).rglob("*.*"))


def matrix(table, names):
    """Return the counts of a table as a matrix."""
    rows = json.loads(table.read_text())["data"]
    found = np.zeros((10, 10), dtype=int)
    for target, prediction, count, _ in rows:
        found[names.index(target), names.index(prediction)] = count
    for target, _, count, share in rows:
        assert share == count / found[names.index(target)].sum()
    confused = [count for target, prediction, count, _ in rows if target != prediction]
    assert confused == sorted(confused, reverse=True) and len(confused) < len(rows)
    assert all(target == prediction for target, prediction, *_ in rows[len(confused) :])
    return found


def test_picture_and_table_are_those_of_scikit_learn(new_run, digits):
    named = Named(digits["test"])
    callback = partial(ConfusionMatrix, dataset_key="test", ignore_index=-1, every_n_epochs=1)
    run = new_run(
        {"ema": Ema, "confusion": callback}, datasets={"train": digits["train"], "test": named}, max_updates=10
    ).train()
    assert run.metrics() == set()
    tables = files(run, "tables")
    assert [path.parent.relative_to(run.paths.artifacts_dir / "tables").as_posix() for path in tables] == [
        "confusion_matrix/test",
        "confusion_matrix/test/ema",
    ]
    kept = named.targets >= 0
    for table, model in zip(tables, (run.model, run["ema"].models["ema"]), strict=True):
        with torch.no_grad():
            predictions = model.eval()(named.inputs).argmax(1)
        wanted = confusion_matrix(named.targets[kept], predictions[kept])
        assert (wanted != np.diag(np.diag(wanted))).any()
        assert (matrix(table, Named.classes) == wanted).all()
    pictures = [path for path in files(run, "images") if path.suffix == ".png"]
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        assert picture.size == (700, 600)


def test_a_target_that_is_no_class_and_wrong_names_are_errors(new_run, digits):
    data = {"train": digits["train"], "test": Named(digits["test"])}
    run = new_run({"confusion": partial(ConfusionMatrix, dataset_key="test", at_start=True)}, datasets=data)
    with pytest.raises(ConfigError, match=r"callbacks\.confusion: 36 targets are not in the 10 classes"):
        run.train()
    callback = partial(ConfusionMatrix, dataset_key="test", classes=["a", "b"], at_start=True)
    run = new_run({"confusion": callback}, run_id="names")
    with pytest.raises(ConfigError, match=r"callbacks\.confusion\.classes: 2 names, but 10 classes"):
        run.train()
