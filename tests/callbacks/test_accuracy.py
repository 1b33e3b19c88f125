from functools import partial

import pytest
import torch
from torch import nn

from callbacks.accuracy import Accuracy
from callbacks.ema import Ema
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError


class Scores(nn.Module):
    """Adds a bias that is learned to scores that are given as inputs."""

    def __init__(self, classes):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x):
        return x + self.bias


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
    with pytest.raises(ConfigError, match=r"class indices.*targets of shape \(6, 4\)"):
        run.train()
