from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from ksuit_runner.data.collators import Cutmix, Mixup, OneOf
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError
from ksuit_runner.testing import tiny_run
from ksuit_runner.trainer.sgd import SgdTrainer

IMAGES = TensorDataset(torch.eye(4).reshape(4, 1, 2, 2).repeat(1, 1, 4, 4), torch.arange(4), output_shape=(4,))
BATCH = (IMAGES.inputs, IMAGES.targets)


def seeded(collator, batch=BATCH):
    np.random.seed(2)
    return collator(batch)


def test_mixup_mixes_inputs_and_targets_alike():
    inputs, targets = seeded(Mixup(4))
    shares = targets[targets > 0]
    assert torch.equal(targets.sum(1), torch.ones(4)) and (targets > 0).sum() == 8
    flat = BATCH[0].flatten(1)
    assert torch.allclose(inputs.flatten(1), targets @ flat) and 0 < shares.min() < 0.5


def test_cutmix_mixes_targets_by_area():
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 8, 10)
    inputs, targets = seeded(Cutmix(4), (images, torch.arange(4)))
    assert ((inputs == images).float().mean((1, 2, 3)) - targets.diagonal()).abs().max() < 1e-6
    assert 0 < targets[0, 0] < 1 and targets[0, 3] == 1 - targets[0, 0]


def test_samples_are_collated_first_and_soft_targets_may_be_mixed_again():
    samples = [IMAGES[index] for index in range(4)]
    for whole, single in zip(seeded(Mixup(4)), seeded(Mixup(4), samples), strict=True):
        assert torch.equal(whole, single)
    _, targets = seeded(Mixup(4), (BATCH[0], torch.full((4, 4), 0.25)))
    assert torch.allclose(targets, torch.full((4, 4), 0.25))
    inputs, targets = seeded(Mixup(4, probability=0.0))
    assert torch.equal(inputs, BATCH[0]) and torch.equal(targets, torch.eye(4))


def test_one_of_several_is_drawn_for_each_batch():
    collator = OneOf([lambda samples: "a", lambda samples: "b"], weights=[3, 1])
    np.random.seed(0)
    drawn = [collator([]) for _ in range(2000)]
    assert 0.72 < drawn.count("a") / 2000 < 0.78
    assert not collator.takes_batches and OneOf([Mixup(3), Cutmix(3)]).takes_batches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(1), "num_classes: a whole number of at least 2"),
        (lambda: Mixup(4, alpha=0), "alpha: a number above 0"),
        (lambda: Mixup(4, probability=2), "probability: a number from 0 to 1"),
        (lambda: Mixup(3)(BATCH), "Mixup needs a class from 0 to 2"),
        (lambda: Mixup(4)((BATCH[0].long(), BATCH[1])), "Mixup needs inputs that are floating-point numbers"),
        (lambda: seeded(Cutmix(4), (torch.rand(4, 3), BATCH[1])), "Cutmix needs images"),
        (lambda: OneOf([]), "weights: one of 0 or more"),
        (lambda: OneOf([len], [1, 2]), "weights: one of 0 or more"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def stacked(samples):
    return {"x": torch.stack([x for x, _ in samples])}


class Whole(TensorDataset):
    """Has a collate function of its own."""

    collate_fn = staticmethod(lambda samples: "own")

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_the_collate_function_of_the_config_comes_before_that_of_a_dataset():
    datasets = {"train": IMAGES, "test": Whole(*BATCH, output_shape=(4,))}

    def batches(collate_fn, num_workers=0):
        data = DataContainer(datasets, 4, seed=0, collate_fn=collate_fn, num_workers=num_workers)
        data.open(data.new_counter(max_updates=1))
        found = data.next_training_batch()[0].batch, next(data.evaluation_batches("test"))
        data.close()
        return found

    train, test = batches({"train": stacked})
    assert train["x"].shape == (4, 1, 8, 8) and test == "own"
    assert all(set(batch) == {"x"} for batch in batches(stacked))
    mixed = batches({"train": Mixup(4)})[0]
    for inline, of_worker in zip(mixed, batches({"train": Mixup(4)}, num_workers=1)[0], strict=True):
        assert torch.equal(inline, of_worker)
    assert mixed[1].shape == (4, 4)


def test_mistakes_in_the_config_of_collate_functions():
    with pytest.raises(ConfigError, match="data.collate_fn.trian: there is no dataset 'trian'. Did you mean 'train'"):
        DataContainer({"train": IMAGES}, 4, seed=0, collate_fn={"trian": stacked})
    with pytest.raises(ConfigError, match="data.collate_fn: 3 is not a function"):
        DataContainer({"train": IMAGES}, 4, seed=0, collate_fn=3)


class Mixing(SgdTrainer):
    """Has its data mixed."""

    def __init__(self, data_container, **kwargs):
        mixed = DataContainer(
            *(data_container.datasets, data_container.batch_size, data_container.seed, data_container.eval_batch_size),
            collate_fn={"train": OneOf([Mixup(10, alpha=0.8), Cutmix(10, probability=0.9)])},
        )
        super().__init__(data_container=mixed, **kwargs)


def test_a_resumed_run_mixes_the_same(tmp_path):
    run = partial(tiny_run, tmp_path, {}, max_updates=6, trainer_class=Mixing, loss=nn.CrossEntropyLoss())
    whole = run("whole").train()
    run("stopped", stop_at=3).train()
    resumed = run("stopped").train()
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
