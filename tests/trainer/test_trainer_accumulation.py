"""A batch computed in parts gives the gradients of the whole batch."""

import pytest
import torch
from by_hand import SGD, gradients, train, weights


@pytest.mark.parametrize("steps", [2, 3, 5, 9])
def test_gradients_do_not_depend_on_accumulation_steps(maker, steps):
    whole = gradients(maker.trainer(dropout=0.0))
    parts = gradients(maker.trainer(dropout=0.0, accumulation_steps=steps))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, msg=name)


def test_training_with_accumulation_and_a_smaller_last_batch(maker):
    options = {"dropout": 0.0, "batch_size": 6, "drop_last": False, "max_epochs": 2, "optimizer": SGD}
    one, three = (maker.trainer(accumulation_steps=steps, **options) for steps in (1, 3))
    for trainer in (one, three):  # what is drawn for samples depends on their part
        data = trainer.data_container.train_dataset
        trainer.data_container.datasets["train"] = list(zip(data.inputs, data.targets, strict=True))
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
