import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from callbacks.predictions import Predictions
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.sgd import SgdTrainer

WORST = partial(Predictions, dataset_key="test", count=9, every_n_updates=4)


def table_of(run, name="worst", step=4):
    return json.loads((run.paths.artifacts_dir / "tables" / name / "test" / f"{step:08}.json").read_text())


def test_the_worst_samples_come_first_with_their_pictures(new_run, digits):
    run = new_run({"worst": partial(WORST, images=4)}, max_updates=4).train()
    images, targets = digits["test"].inputs, digits["test"].targets
    with torch.no_grad():
        scores = run.model.module(images)
    losses = cross_entropy(scores, targets, reduction="none")
    worst = losses.argsort(descending=True)[:9].tolist()
    table = table_of(run)
    assert table["columns"] == ["sample", "target", "prediction", "loss", "confidence"]
    assert [row[:3] for row in table["data"]] == [[i, targets[i].item(), scores[i].argmax().item()] for i in worst]
    wanted = [[losses[i].item(), scores[i].softmax(0).max().item()] for i in worst]
    assert [row[3:] for row in table["data"]] == [pytest.approx(row, rel=1e-5) for row in wanted]
    [path] = (run.paths.artifacts_dir / "images").glob("worst~test+step+4*.png")
    picture = np.asarray(Image.open(path))
    assert picture.shape == (18, 18)  # two by two, with lines of two pixels between them
    for number, (top, left) in enumerate([(0, 0), (0, 10), (10, 0), (10, 10)]):
        shown = picture[top : top + 8, left : left + 8]
        assert np.array_equal(shown, np.rint(images[worst[number], 0].numpy() * 255).astype(np.uint8))


def test_a_resumed_run_writes_the_same_files_and_training_is_the_same_without(new_run):
    whole = new_run({"worst": WORST}, run_id="whole", max_updates=8).train()
    new_run({"worst": WORST}, run_id="cut", max_updates=8, stop_at=5).train()
    resumed = new_run({"worst": WORST}, run_id="cut", max_updates=8).train()
    assert [table_of(resumed, step=step) for step in (4, 8)] == [table_of(whole, step=step) for step in (4, 8)]
    alone = new_run({}, run_id="alone", max_updates=8).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


def test_values_have_their_squared_error_and_tokens_the_mean_of_their_losses(new_run):
    options = {"batch_size": 3, "max_updates": 4, "optimizer": partial(torch.optim.SGD, lr=0.0)}
    values = TensorDataset(torch.tensor([[1.0], [4.0], [2.5]]), torch.tensor([[1.5], [2.0], [2.5]]), (1,))
    given = {"datasets": {"train": values, "test": values}, "loss": nn.MSELoss(), "module": Same(1)}
    table = table_of(new_run({"worst": WORST}, run_id="values", **given, **options).train())
    assert table == {
        "columns": ["sample", "target", "prediction", "loss"],
        "data": [[1, 2, 4, 4], [0, 1.5, 1, 0.25], [2, 2.5, 2.5, 0]],
    }
    scores, classes = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)), torch.arange(15).view(3, 5) % 4
    tokens = TensorDataset(scores, classes, (5, 4))
    given = {"datasets": {"train": tokens, "test": tokens}, "module": Same(4)}
    table = table_of(new_run({"worst": WORST}, run_id="tokens", **given, **options).train())
    losses = [cross_entropy(of_sample, wanted).item() for of_sample, wanted in zip(scores, classes, strict=True)]
    assert [row[3] for row in table["data"]] == pytest.approx(sorted(losses, reverse=True))
    assert [row[1] for row in table["data"]] == [None, None, None]


def test_the_outputs_of_one_head_of_several(new_run):
    scores, classes = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 2])
    data = TensorDataset(scores, classes, (4,))
    given = {"datasets": {"train": data, "test": data}, "module": Heads(), "batch_size": 3, "trainer_class": OfFirst}
    run = new_run({"worst": partial(WORST, outputs="heads/1")}, **given, max_updates=4)
    losses = cross_entropy(-scores, classes, reduction="none")
    assert [row[0] for row in table_of(run.train())["data"]] == losses.argsort(descending=True).tolist()
    run = new_run({"worst": WORST}, run_id="none", **given, max_updates=4)
    with pytest.raises(
        ConfigError, match=r"callbacks\.worst\.outputs: there are several outputs, of which one has to be named"
    ):
        run.train()


class Same(nn.Module):
    """Returns its inputs, plus a bias of 0."""

    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x + self.bias


class Heads(Same):
    """Returns the inputs, and as a second head what is opposite."""

    def __init__(self):
        super().__init__(4)

    def forward(self, x):
        return {"heads": [x + self.bias, -x]}


class OfFirst(SgdTrainer):
    """Trains the first head."""

    def training_step(self, batch, model):
        outputs = model(batch[0])
        return self.loss(outputs["heads"][0], batch[1]), outputs


def test_inputs_that_are_no_pictures_are_an_error(new_run):
    data = TensorDataset(torch.rand(6, 4), torch.arange(6) % 4, (4,))
    given = {"datasets": {"train": data, "test": data}, "module": Same(4), "batch_size": 6}
    run = new_run({"worst": partial(WORST, images=1)}, **given, max_updates=4)
    with pytest.raises(ConfigError, match=r"callbacks\.worst: the inputs are no pictures.* of shape \(1, 4\)"):
        run.train()
    with pytest.raises(ConfigError, match="count: a whole number of at least 1 is needed"):
        new_run({"worst": partial(WORST, count=0)})
