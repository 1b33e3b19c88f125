from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.samples import Samples
from ksuit_runner.data.digits import Digits
from ksuit_runner.errors import ConfigError


class Augmented(Digits):
    """Digits that are darker or brighter each time, and normalized."""

    def __getitems__(self, indices):
        images, targets = super().__getitems__(indices)
        return images * torch.empty(len(images), 1, 1, 1).uniform_(0.5, 1.0) * 4 - 2, targets


def picture_of(run, step=0):
    [path] = (run.paths.artifacts_dir / "images").glob(f"samples~train+step+{step}+*.png")
    return np.asarray(Image.open(path)).astype(int)


def test_a_row_has_a_sample_and_its_columns_what_augmentations_make_of_it(new_run, digits):
    data = {"train": Augmented("train"), "test": digits["test"]}
    options = {"datasets": data, "max_updates": 6}
    callbacks = {"samples": partial(Samples, count=3, draws=2, at_start=True, every_n_updates=4)}
    whole = new_run(callbacks, run_id="whole", **options).train()
    picture = picture_of(whole)
    assert picture.shape == (28, 18)
    chosen = np.linspace(0, len(digits["train"]) - 1, 3).astype(int)
    for row, index in enumerate(chosen):
        bright = digits["train"].inputs[index, 0].numpy() > 0.5
        first, second = (picture[10 * row : 10 * row + 8, left : left + 8] for left in (0, 10))
        assert not np.array_equal(first, second)
        for shown in (first, second):  # what is scaled by one factor is the same picture
            values, wanted = (part[bright] - part.min() for part in (shown, digits["train"].inputs[index, 0].numpy()))
            assert np.corrcoef(values, wanted)[0, 1] > 0.99
    new_run(callbacks, run_id="cut", **options, stop_at=3).train()
    resumed = new_run(callbacks, run_id="cut", **options).train()
    assert all(np.array_equal(picture_of(resumed, step), picture_of(whole, step)) for step in (0, 4))
    alone = new_run({}, run_id="alone", **options).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


def test_a_number_below_one_is_refused(new_run):
    with pytest.raises(ConfigError, match="count: a whole number of at least 1 is needed"):
        new_run({"samples": partial(Samples, count=0, at_start=True)})
