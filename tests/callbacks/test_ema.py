from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from callbacks.accuracy import Accuracy
from callbacks.ema import Ema
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.errors import CheckpointError, ConfigError, KsuitError, ResumeError


class Recorder(CallbackBase):
    """Keeps a copy of the weights after every update."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.history: list[dict[str, Tensor]] = []

    def _record(self):
        self.history.append({name: tensor.clone() for name, tensor in self.model.tensors().items()})

    def _before_training(self, update_counter):
        self._record()

    def _track_after_update_step(self, update_counter):
        self._record()


class Tied(nn.Module):
    """Has a parameter with two names, a frozen one, a count, and a mask of infinities."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(10), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0] * 10 + [-torch.inf] * 54))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.calls += 1
        scores = self.second(self.first(x.flatten(1))) + self.mask
        return scores[:, :10] * self.scale


def expected(history, name, decay, warmup):
    average = history[0][name].double()
    for n, weights in enumerate(history[1:], 1):
        now = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = now * average + (1 - now) * weights[name].double()
    return average


@pytest.mark.parametrize("warmup", [True, False])
def test_each_average_is_that_of_the_formula(new_run, warmup):
    ema = partial(Ema, decays=[0.5, 0.99], warmup=warmup)
    run = new_run({"ema": ema, "recorder": Recorder}, max_updates=30).train()
    history = run["recorder"].history
    assert len(history) == 31
    for decay in (0.5, 0.99):
        averages = run["ema"].models[f"ema_{decay}"].tensors()
        assert averages.keys() == history[0].keys()
        for name, average in averages.items():
            wanted = expected(history, name, decay, warmup)
            torch.testing.assert_close(average.double(), wanted, rtol=0, atol=1e-5)
            assert not torch.allclose(wanted.float(), history[-1][name], atol=1e-3)


def test_shared_weights_are_averaged_once_and_buffers_are_copied(new_run):
    run = new_run({"ema": partial(Ema, decays=[0.9]), "recorder": Recorder}, module=Tied(), max_updates=5).train()
    average = run["ema"].models["ema"].module
    assert average.second.weight is average.first.weight
    wanted = expected(run["recorder"].history, "first.weight", 0.9, True)
    torch.testing.assert_close(average.first.weight.double(), wanted, rtol=0, atol=1e-5)
    assert average.calls == 5
    assert torch.equal(average.mask, run.model.module.mask)
    assert torch.equal(average.scale, torch.ones(10))


def test_the_averages_are_offered_for_evaluation_as_they_are(new_run):
    run = new_run({"ema": partial(Ema, decays=[0.9, 0.99]), "one": partial(Ema, decays=[0.5])})
    models = run.run.trainer.evaluation_models
    assert list(models) == ["", "ema_0.9", "ema_0.99", "one"]
    model = models["one"]
    before = model.module.layer.weight.clone()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    run.train()
    assert run.run.trainer.evaluation_models["one"] is model
    assert not torch.equal(model.module.layer.weight, before)


def test_a_resumed_run_has_the_same_bytes(new_run):
    callbacks = {
        "ema": partial(Ema, decays=[0.9, 0.99]),
        "accuracy": partial(Accuracy, dataset_key="test", every_n_updates=10),
    }
    whole = new_run(callbacks, run_id="whole").train()
    new_run(callbacks, run_id="cut", stop_at=33).train()
    resumed = new_run(callbacks, run_id="cut")
    assert resumed.run.counter.update == resumed["ema"].updates == 33
    resumed.train()
    files = ["model.safetensors", "ema_0.9.safetensors", "ema_0.99.safetensors"]
    name = whole.paths.latest.read_text().strip()
    for file in files:
        one, other = (run.paths.checkpoints_dir / name / file for run in (whole, resumed))
        assert one.read_bytes() == other.read_bytes()
    for key in ("accuracy/test", "accuracy/test/ema_0.9", "accuracy/test/ema_0.99"):
        assert len(whole.metric(key)) == 6
        assert whole.metric(key) == resumed.metric(key)


def test_averaging_changes_nothing_about_training(new_run):
    plain = new_run({}, run_id="plain").train()
    averaged = new_run({"ema": Ema}, run_id="averaged").train()
    assert torch.equal(plain.model.module.layer.weight, averaged.model.module.layer.weight)


def test_a_file_of_weights_is_loadable_into_the_plain_module(new_run):
    run = new_run({"ema": Ema}, max_updates=3).train()
    stored = load_file(run.paths.checkpoints_dir / "E0_U3_S216" / "ema.safetensors")
    assert stored.keys() == run.model.module.state_dict().keys()
    assert torch.equal(stored["layer.weight"], run["ema"].models["ema"].module.layer.weight)


def test_an_average_that_begins_at_a_resume_begins_at_the_loaded_weights(new_run):
    new_run({}, stop_at=10).train()
    with pytest.raises(ResumeError, match="ema"):
        new_run({"ema": Ema})
    resumed = new_run({"ema": partial(Ema, warmup=False), "recorder": Recorder}, strict=False, max_updates=12).train()
    wanted = expected(resumed["recorder"].history, "layer.weight", 0.99, False)
    average = resumed["ema"].models["ema"].module.layer.weight
    torch.testing.assert_close(average.double(), wanted, rtol=0, atol=1e-6)


def test_another_decay_at_a_resume_lacks_its_file(new_run):
    new_run({"ema": Ema}, stop_at=10).train()
    with pytest.raises(CheckpointError, match=r"callbacks\.ema: .*E0_U10_S720.ema_0.9.safetensors is missing"):
        new_run({"ema": partial(Ema, decays=[0.9, 0.99])})


@pytest.mark.parametrize("decays", [[], [0.9, 0.9], [0.0], [1.0], [0.9, 1.1]])
def test_decays_that_make_no_average_are_refused(new_run, decays):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        new_run({"ema": partial(Ema, decays=decays)})


def test_two_averages_of_one_name_are_refused(new_run):
    with pytest.raises(KsuitError, match=r"'ema_0\.9'"):
        new_run({"ema": partial(Ema, decays=[0.9, 0.99]), "ema_0.9": Ema})
