import math
from functools import partial

import pytest
import torch
from torchmetrics.text import Perplexity as Reference

from callbacks.ema import Ema
from callbacks.perplexity import Perplexity
from ksuit_runner.data.python_docs import PythonDocs
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.gpt import Gpt

LENGTH = 16


class Padded(PythonDocs):
    """Text, of whose spaces nothing is expected."""

    def __getitems__(self, indices):
        inputs, targets = super().__getitems__(indices)
        return inputs, targets.masked_fill(targets == self.encode(" ").item(), -100)


@pytest.fixture(scope="module")
def texts():
    split = partial(Padded, context_length=LENGTH, stride=900)
    return {"train": split("train"), "test": split("test")}


def test_it_is_that_of_torchmetrics(new_run, texts):
    run = new_run(
        {"ema": Ema, "perplexity": partial(Perplexity, dataset_key="test", batch_size=7, every_n_updates=6)},
        module=Gpt((LENGTH,), (LENGTH, 96), embed_dim=16, depth=1, num_heads=2),
        datasets=texts,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        max_updates=6,
    ).train()
    inputs, targets = texts["test"].__getitems__(range(len(texts["test"])))
    assert (targets == -100).any()
    for weights, model in (("", run.model), ("/ema", run["ema"].models["ema"])):
        reference = Reference(ignore_index=-100)
        with torch.no_grad():
            wanted = float(reference(model.eval()(inputs), targets))
        assert 1 < wanted < 96
        assert run.metric(f"perplexity/test{weights}") == {6: pytest.approx(wanted, rel=1e-5)}
        assert run.metric(f"bits_per_character/test{weights}") == {6: pytest.approx(math.log2(wanted), rel=1e-5)}


def test_the_unit_is_in_the_name_and_a_uniform_guess_has_as_many_as_there_are(new_run, digits):
    # The linear model begins with scores that are 0 for black images.
    black = TensorDataset(torch.zeros(8, 1, 8, 8), torch.arange(8), (10,))
    run = new_run(
        {"perplexity": partial(Perplexity, dataset_key="test", unit="digit", at_start=True)},
        datasets={"train": black, "test": black},
        batch_size=8,
        max_updates=1,
        module=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False)),
    ).train()
    assert run.metric("perplexity/test")[0] == pytest.approx(10)
    assert run.metric("bits_per_digit/test")[0] == pytest.approx(math.log2(10))


def test_targets_that_are_no_classes_are_an_error(new_run):
    data = TensorDataset(torch.rand(6, 4), torch.rand(6, 4), (4,))
    run = new_run(
        {"perplexity": partial(Perplexity, dataset_key="test", at_start=True)},
        module=torch.nn.Linear(4, 4),
        datasets={"train": data, "test": data},
        batch_size=2,
        loss=torch.nn.MSELoss(),
    )
    with pytest.raises(ConfigError, match=r"callbacks\.perplexity: .*class indices"):
        run.train()
