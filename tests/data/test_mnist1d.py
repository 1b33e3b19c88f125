import random
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from ksuit_runner.data.mnist1d import Mnist1d
from ksuit_runner.errors import ConfigError

needs_package = pytest.mark.skipif(find_spec("mnist1d") is None, reason="mnist1d is not installed")


@needs_package
@pytest.mark.filterwarnings("ignore")  # those of the package's own imports
def test_it_is_the_published_dataset_and_leaves_the_generators_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    train, test = Mnist1d("train"), Mnist1d("test")
    assert (random.random(), np.random.rand()) == before
    assert (train.inputs.shape, test.inputs.shape) == ((4000, 1, 1, 40), (1000, 1, 1, 40))
    assert (train.input_shape, train.output_shape) == ((1, 1, 40), (10,))
    assert (train.inputs.dtype, train.targets.dtype) == (torch.float32, torch.int64)
    everything = torch.cat([train.inputs, test.inputs])
    assert abs(everything.mean()) < 1e-5 and abs(everything.std() - 1) < 1e-3
    assert torch.equal(torch.cat([train.targets, test.targets]).bincount(), torch.full((10,), 500))
    assert torch.equal(Mnist1d("test").inputs, test.inputs)
    assert not torch.equal(Mnist1d("test", data_seed=1).inputs, test.inputs)


def test_unknown_split() -> None:
    with pytest.raises(ConfigError, match=r"no split 'tset'\. Did you mean 'test'"):
        Mnist1d("tset")  # type: ignore[arg-type]
