"""A batch computed in parts gives the gradients of the whole batch."""

from collections import namedtuple

import pytest
import torch
from by_hand import SGD, gradients, train, weights

Pair = namedtuple("Pair", "inputs targets")


@pytest.mark.parametrize("steps", [2, 3, 5, 9])
def test_gradients_do_not_depend_on_accumulation_steps(maker, steps):
    whole = gradients(maker.trainer(dropout=0.0))
    parts = gradients(maker.trainer(dropout=0.0, accumulation_steps=steps))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, msg=name)


@pytest.mark.parametrize("kind", [list, tuple, Pair._make])
def test_batches_of_all_kinds_are_cut_into_all_their_samples(maker, kind):
    """A list of names is cut, a list of tensors is one level of the batch: default_collate makes both."""
    batch = {"pair": kind([torch.arange(5), torch.arange(5, 10)]), "names": list("abcde"), "y": torch.ones(5)}
    parts = maker.trainer(accumulation_steps=3).split(batch)
    assert [part.share for part in parts] == [0.2, 0.4, 0.4]
    assert [part.batch["names"] for part in parts] == [["a"], ["b", "c"], ["d", "e"]]
    assert [part.batch["pair"][1].tolist() for part in parts] == [[5], [6, 7], [8, 9]]
    assert all(type(part.batch["pair"]) is type(batch["pair"]) for part in parts)


def test_training_with_accumulation_and_a_smaller_last_batch(maker):
    options = {"dropout": 0.0, "batch_size": 6, "drop_last": False, "max_epochs": 2, "optimizer": SGD}
    one, three = (maker.trainer(accumulation_steps=steps, **options) for steps in (1, 3))
    assert train(one) == train(three) == [6, 6, 6, 2] * 2
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(three)[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("ends", "updates"),
    [
        ({"max_epochs": 2}, 6),
        ({"max_updates": 5}, 5),
        ({"max_samples": 19}, 4),
        ({"max_epochs": 9, "max_samples": 6}, 1),
    ],
)
def test_every_kind_of_end_is_exact(maker, ends, updates, steps):
    assert len(train(maker.trainer(accumulation_steps=steps, **ends))) == updates
