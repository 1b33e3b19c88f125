"""A model's values go into files and come back, whatever its ``state_dict`` holds and became of its buffers."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from callbacks.ema import Ema
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError
from ksuit_runner.models.base import ModelBase


class Changing(nn.Module):
    """Its buffers come, go and grow in training, and it depends on all of them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("comes", None)
        self.register_buffer("goes", torch.ones(3))
        self.register_buffer("grows", torch.ones(1))
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.register_buffer("passing_comes", None, persistent=False)

    def forward(self, x):
        outputs = self.head(x)
        if self.training:
            mean = outputs.mean(0).detach()
            self.comes = mean if self.comes is None else 0.9 * self.comes + 0.1 * mean
            self.goes = None
            self.grows = torch.cat([self.grows, mean[:1]])
            self.passing = self.passing + mean
            self.passing_comes = self.passing.clone()
            if not hasattr(self, "late"):
                self.register_buffer("late", torch.zeros(3))
            self.late = self.late + mean
        return outputs - self.passing - self.grows.mean() - self.late


class Odd(nn.Module):
    """Has what no file of tensors holds."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("precise", torch.full((2,), 1j, dtype=torch.complex128))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, x):
        self.calls += self.training
        self.sparse = (self.sparse * 0.9).coalesce()
        return self.head(x) @ self.sparse.to_dense() + self.precise.imag[0] * self.calls


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("cls", [Changing, Odd])
@pytest.mark.parametrize("callbacks", [(), ("ema",)], ids=["plain", "ema"])
def test_a_resumed_run_is_the_uninterrupted_one(maker, cls, callbacks):
    callbacks = {name: (Ema, {}) for name in callbacks}
    options = {"max_updates": 6, "checkpoint": {"every_n_updates": 3, "keep_last": 9}}
    train(maker.run(callbacks, model=cls(), **options))
    run = maker.resumed(callbacks, update=3, model=cls(), **options)
    train(run)
    one, other = (read_newest(maker.paths(run_id)).paths.checkpoint_dir for run_id in ("run00000", "run00000-resumed"))
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_what_no_file_of_tensors_holds_is_read_with_the_rest(maker):
    train(maker.run(model=Odd()))
    found = read_newest(maker.paths()).model
    model = Odd()
    model.load_state_dict(found)
    assert model.calls == 8 and found["precise"].dtype == torch.complex128
    assert found["sparse"].is_sparse


class Unstorable(nn.Linear):
    def get_extra_state(self):
        return {"lock": object()}

    def set_extra_state(self, state): ...


def test_extra_state_that_cannot_be_stored_is_refused_before_the_first_update(maker):
    run = maker.run(model=nn.Sequential(nn.Linear(4, 3), Unstorable(3, 3)))
    with pytest.raises(
        CheckpointError, match=r"model\['1\._extra_state'\]\['lock'\]: a builtins.object cannot be stored"
    ):
        train(run)
    assert run.counter.update == 0


def test_tensors_of_callbacks_that_no_file_holds_are_refused(maker):
    run = maker.run()
    run.checkpoint_writer.add_tensors("mine", lambda: {"x": torch.eye(2).to_sparse()})
    with pytest.raises(CheckpointError, match=r"mine.safetensors: 'x' is not a dense tensor"):
        train(run)


def test_values_of_another_model_are_refused():
    stored = ModelBase(Changing())
    stored(torch.rand(2, 4))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ModelBase(Changing()).load(stored.tensors())
    with pytest.raises(RuntimeError, match="size mismatch"):
        ModelBase(nn.Linear(4, 3)).load({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, stored.arrangement())


def parametrized(wrap):
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))


def pruned(module):
    return prune.l1_unstructured(module, "weight", 0.5)


WRAPS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "old weight norm": nn.utils.weight_norm,
    "pruned": pruned,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", WRAPS)
def test_computed_weights_are_copied_and_averaged(maker, name):
    build = partial(parametrized, WRAPS[name])
    model = ModelBase(build())
    inputs = torch.rand(5, 4)
    model(inputs).sum().backward()
    assert torch.equal(model.copy().eval()(inputs), model.eval()(inputs))
    options = {"max_updates": 6, "checkpoint": {"every_n_updates": 3, "keep_last": 9}}
    whole = maker.run({"ema": (Ema, {"decays": [0.5]})}, model=build(), **options)
    train(whole)
    average = whole.hooks.callbacks["ema"].models["ema"]
    live = whole.trainer.model
    assert not torch.equal(average(inputs), live.eval()(inputs))
    resumed = maker.resumed({"ema": (Ema, {"decays": [0.5]})}, update=3, model=build(), **options)
    train(resumed)
    assert torch.equal(resumed.hooks.callbacks["ema"].models["ema"](inputs), average(inputs))
    assert torch.equal(resumed.trainer.model.eval()(inputs), live.eval()(inputs))


def test_strides_are_stored_under_the_names_of_torch():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(4, 3, bias=False)))
    module[2][0].weight = module[0].weight  # under its first name only
    module[2].register_buffer("mask", torch.ones(2, 5).t())
    module[0].weight.data = torch.ones(4, 3).t()
    stored = ModelBase(module).arrangement()["strides"]
    named = [*module.named_parameters(), *module.named_buffers()]
    assert list(stored.items()) == [(name, item.stride()) for name, item in named if not item.is_contiguous()]
    assert list(stored) == ["0.weight", "2.mask"]
