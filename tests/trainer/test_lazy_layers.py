"""Lazy layers have their sizes before anything is built on their parameters, the same in every process."""

import pytest
import torch
from torch import nn

from callbacks.ema import Ema
from callbacks.parameter_count import ParameterCount
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Dropout(0.5), nn.ReLU(), nn.LazyLinear(3))


pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules")


def test_a_model_of_lazy_layers_trains_and_resumes_exactly(maker):
    callbacks = {"ema": (Ema, {}), "count": (ParameterCount, {})}
    options = {"max_updates": 6, "checkpoint": {"every_n_updates": 3, "keep_last": 9}}
    run = maker.run(callbacks, model=lazy(), **options)
    assert run.trainer.model.training and run.trainer.model.parameter_count == 4 * 8 + 8 + 16 + 8 * 3 + 3
    assert run.trainer.model.module[1].num_batches_tracked == 0
    train(run)
    train(maker.resumed(callbacks, update=3, model=lazy(), **options))
    one, other = (read_newest(maker.paths(run_id)).paths.checkpoint_dir for run_id in ("run00000", "run00000-resumed"))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_the_weights_depend_on_the_seed_only(maker):
    torch.manual_seed(1)
    first = maker.trainer(model=lazy()).model.module[0].weight
    drawn = torch.rand(1)
    torch.manual_seed(1)
    second = maker.trainer(model=lazy(), dropout=0.1).model.module[0].weight
    assert torch.equal(first, second) and torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize("fault", ["fails", "is not used"])
def test_sizes_that_are_not_found_are_an_error(maker, fault):
    model = nn.Sequential(nn.Linear(5 if fault == "fails" else 4, 3), *lazy())
    if fault == "is not used":
        model.forward = model[0].forward
    with pytest.raises(ConfigError, match=r"model: lazy layers \(1, 2, 5\) get their sizes .* Give them their sizes"):
        maker.trainer(model=model)
