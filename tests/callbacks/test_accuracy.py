import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch import nn

from callbacks.accuracy import Accuracy
from callbacks.ema import Ema
from ksuit_runner.data.digits import Digits
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.sgd import SgdTrainer


class Scores(nn.Module):
    """Adds a bias that is learned to scores that are given as inputs."""

    def __init__(self, classes):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x):
        return x + self.bias


class Frozen(Scores):
    """Returns the scores as they are: what it learns has no effect."""

    def forward(self, x):
        return x + 0 * self.bias


def accuracy_of(model, dataset, k=1):
    """Count by hand: a hit is a target that fewer than k classes are above."""
    model.eval()
    hits = 0
    with torch.no_grad():
        for inputs, target in zip(dataset.inputs, dataset.targets, strict=True):
            scores = model(inputs.unsqueeze(0))[0]
            hits += int((scores > scores[target]).sum() < k)
    return hits / len(dataset)


def test_live_and_averaged_weights_as_counted_by_hand(new_run, digits):
    # The test set of 359 is evaluated in batches of 100, the last one is smaller.
    run = new_run(
        {"ema": Ema, "accuracy": partial(Accuracy, dataset_key="test", topk=[3, 1], every_n_epochs=1)}, max_updates=20
    ).train()
    assert run.metrics() == {"accuracy/test", "accuracy/test/ema", "accuracy_top3/test", "accuracy_top3/test/ema"}
    for weights, model in (("", run.model), ("/ema", run["ema"].models["ema"])):
        for metric, k in (("accuracy", 1), ("accuracy_top3", 3)):
            wanted = accuracy_of(model, digits["test"], k)
            assert 0.3 < wanted < 1
            assert run.metric(f"{metric}/test{weights}") == {20: wanted}


def test_every_evaluation_starts_from_zero(new_run, digits):
    accuracy = partial(Accuracy, dataset_key="test", every_n_updates=2)
    run = new_run({"accuracy": accuracy}, max_updates=6).train()
    found = run.metric("accuracy/test")
    assert list(found) == [2, 4, 6]
    assert found[2] < found[6] == accuracy_of(run.model, digits["test"])


def test_scores_with_more_dimensions_count_every_prediction(new_run):
    # Two sequences of three tokens with four classes.
    scores = torch.tensor(
        [
            [[9, 0, 1, 2], [0, 9, 8, 7], [1, 2, 3, 9]],
            [[9, 8, 7, 0], [0, 1, 2, 9], [5, 9, 6, 0]],
        ],
        dtype=torch.float32,
    )
    targets = torch.tensor([[0, 2, 3], [3, 2, 0]])
    data = TensorDataset(scores, targets, (3, 4))
    run = new_run(
        {"accuracy": partial(Accuracy, dataset_key="test", topk=[1, 2, 3, 4], every_n_updates=1)},
        module=Scores(4),
        datasets={"train": data, "test": data},
        batch_size=2,
        max_updates=1,
        optimizer=partial(torch.optim.SGD, lr=0),
    ).train()
    found = [run.metric(key)[1] for key in ("accuracy/test", *(f"accuracy_top{k}/test" for k in (2, 3, 4)))]
    assert found == [2 / 6, 4 / 6, 5 / 6, 1.0]


@pytest.mark.parametrize("topk", [[], [0], [1, -1]])
def test_numbers_below_one_are_refused(new_run, topk):
    with pytest.raises(ConfigError, match="topk"):
        new_run({"accuracy": partial(Accuracy, dataset_key="test", topk=topk, every_n_epochs=1)})


def test_more_than_the_classes_is_an_error_at_the_first_evaluation(new_run):
    run = new_run({"top": partial(Accuracy, dataset_key="test", topk=[11], every_n_updates=1)})
    with pytest.raises(ConfigError, match=r"callbacks\.top\.topk: 11 is more than the 10 classes"):
        run.train()


def test_targets_that_are_no_classes_are_an_error(new_run):
    data = TensorDataset(torch.rand(6, 4), torch.rand(6, 4), (4,))
    run = new_run(
        {"accuracy": partial(Accuracy, dataset_key="test", every_n_updates=1)},
        module=Scores(4),
        datasets={"train": data, "test": data},
        batch_size=2,
        loss=nn.MSELoss(),
    )
    with pytest.raises(ConfigError, match=r"class indices.*targets float32 \(6, 4\)"):
        run.train()


class TwoHeads(nn.Module):
    """Scores of the digit, and for every pixel whether it is dark: (batch, classes) and (batch, classes, height)."""

    def __init__(self):
        super().__init__()
        self.digit, self.dark = nn.Linear(64, 10), nn.Linear(64, 16)

    def forward(self, x):
        x = x.flatten(1)
        return {"digit": self.digit(x), "masks": [self.dark(x).view(-1, 2, 8)]}


class TwoHeadsTrainer(SgdTrainer):
    def training_step(self, batch, model):
        inputs, targets = batch
        outputs = model(inputs)
        return self.loss(outputs["digit"], targets["digit"]) + self.loss(outputs["masks"][0], targets["dark"]), outputs


class TwoTargets(Digits):
    def __getitems__(self, indices):
        inputs, targets = super().__getitems__(indices)
        dark = (inputs.mean((1, 2)) > 0.4).long()
        return inputs, {"digit": targets, "dark": dark.masked_fill(inputs.amax((1, 2)) == 0, -100)}


HEADS = {
    "digit": {"outputs": "digit", "targets": "digit"},
    "dark": {"outputs": "masks/0", "targets": "dark"},
    "even": {"outputs": "digit", "targets": "digit", "classes": [0, 2, 4, 6, 8]},
    "even_alone": {"outputs": "digit", "targets": "digit", "classes": [0, 2, 4, 6, 8], "restrict_scores": True},
}


def test_heads_of_several_outputs_and_subsets_of_classes_are_those_of_scikit_learn(new_run):
    datasets = {split: TwoTargets(split) for split in ("train", "test")}
    kwargs = {"dataset_key": "test", "topk": [1, 2], "heads": HEADS, "ignore_index": -100, "every_n_epochs": 1}
    run = new_run(
        {"accuracy": partial(Accuracy, **kwargs)},
        module=TwoHeads(),
        datasets=datasets,
        trainer_class=TwoHeadsTrainer,
        max_updates=15,
    ).train()
    inputs, targets = datasets["test"].__getitems__(range(359))
    with torch.no_grad():
        outputs = run.model.module.eval()(inputs)
    scores, digits, even = outputs["digit"].numpy(), targets["digit"].numpy(), [0, 2, 4, 6, 8]
    dark, is_even = targets["dark"].flatten().numpy(), np.isin(targets["digit"], even)
    assert 0 < (dark != -100).sum() < dark.size
    found = {name: run.metric(f"accuracy_{name}/test")[15] for name in HEADS}
    assert found == {
        "digit": accuracy_score(digits, scores.argmax(1)),
        "dark": accuracy_score(dark[dark != -100], outputs["masks"][0].argmax(1).flatten().numpy()[dark != -100]),
        "even": accuracy_score(digits[is_even], scores[is_even].argmax(1)),
        "even_alone": accuracy_score(digits[is_even], np.array(even)[scores[is_even][:, even].argmax(1)]),
    }
    assert found["even"] < found["even_alone"]
    assert run.metric("accuracy_top2_digit/test")[15] == top_k_accuracy_score(digits, scores, k=2)
    assert len(run.metrics()) == 8


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"output": "digit"}, r"heads\.a: there is no 'output'. Did you mean 'outputs'"),
        ({"classes": [1, 1]}, r"heads\.a\.classes: different class indices"),
        ({"classes": 3}, r"heads\.a\.classes: different class indices of at least 0 are needed, not 3"),
        ({"classes": [-1]}, r"heads\.a\.classes: different class indices"),
        ({"restrict_scores": True}, r"heads\.a\.restrict_scores: there are no `classes`"),
        ({"classes": [3, 10]}, r"heads\.a\.classes: 10 is not one of the 10 classes"),
        ({"outputs": "digit"}, r"heads\.a\.outputs: there are no several outputs, but a Tensor: leave it out"),
    ],
)
def test_a_wrong_head_says_what_is_wrong_where(new_run, head, message):
    accuracy = partial(Accuracy, dataset_key="test", heads={"a": head}, every_n_updates=1)
    with pytest.raises(ConfigError, match=rf"callbacks\.accuracy\.{message}"):
        new_run({"accuracy": accuracy}, max_updates=1).train()


def test_a_wrong_path_names_what_there_is(new_run):
    datasets = {split: TwoTargets(split) for split in ("train", "test")}
    for head, message in (
        (
            {"outputs": "digits"},
            "outputs: there is no 'digits' in the outputs. Did you mean 'digit'",
        ),
        ({"outputs": "masks/1"}, "outputs: there is no 'masks/1' in the outputs. Did you mean 'masks/0'"),
        ({"outputs": "digit"}, "targets: there are several targets, of which one has to be named. Valid: dark, digit."),
    ):
        run = new_run(
            {"accuracy": partial(Accuracy, dataset_key="test", heads={"a": head}, every_n_updates=1)},
            module=TwoHeads(),
            datasets=datasets,
            trainer_class=TwoHeadsTrainer,
            max_updates=1,
        )
        with pytest.raises(ConfigError, match=re.escape(f"callbacks.accuracy.heads.a.{message}")):
            run.train()


def test_of_equal_scores_the_first_class_counts_as_it_does_for_every_metric_of_the_predicted_class(new_run):
    # Few different values, as in half precision.
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (200, 50), generator=generator).float()
    scores[0, 3] = torch.nan
    targets = torch.randint(50, (200,), generator=generator)
    datasets = {
        "train": TensorDataset(scores[1:], targets[1:], (50,)),
        "test": TensorDataset(scores, targets, (50,)),
    }
    callbacks = {"accuracy": partial(Accuracy, dataset_key="test", topk=[1, 2, 7], every_n_updates=1)}
    run = new_run(callbacks, module=Frozen(50), datasets=datasets, max_updates=1).train()
    with torch.no_grad():
        found = run.model.module.eval()(scores)
    ordered = torch.sort(found, stable=True, descending=True).indices
    for k, metric in ((1, "accuracy"), (2, "accuracy_top2"), (7, "accuracy_top7")):
        hits = (ordered[:, :k] == targets.unsqueeze(1)).any(1).sum().item()
        assert run.metric(f"{metric}/test") == {1: pytest.approx(hits / 200)}
