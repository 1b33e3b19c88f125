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
    with pytest.raises(ConfigError, match="between 0 and 1|different numbers"):
        new_run({"ema": partial(Ema, decays=decays)})


def test_two_averages_of_one_name_are_refused(new_run):
    with pytest.raises(KsuitError, match=r"'ema_0\.9'"):
        new_run({"ema": partial(Ema, decays=[0.9, 0.99]), "ema_0.9": Ema})


class Centered(nn.Module):
    """Reassigns a buffer in its forward pass, another one through .data, and one that is None at first."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer("center", torch.zeros(10))
        self.register_buffer("total", torch.zeros(10))
        self.register_buffer("last", None)

    def forward(self, x):
        outputs = self.layer(x.flatten(1))
        if self.training:
            self.center = 0.9 * self.center + 0.1 * outputs.mean(0).detach()
            self.total.data = self.total.data + self.center
            self.last = outputs[:3].detach()
        return outputs - self.center


def test_buffers_are_those_of_the_model_whatever_was_reassigned(new_run):
    run = new_run({"ema": partial(Ema, decays=[0.9])}, module=Centered(), max_updates=5).train()
    live, average = run.model.module, run["ema"].models["ema"].module
    for name, buffer in live.named_buffers():
        assert torch.equal(average.get_buffer(name), buffer) and average.get_buffer(name) is not buffer
    assert live.center.any() and not torch.equal(average.layer.weight, live.layer.weight)


class Replaces(CallbackBase):
    """Replaces the head with a frozen one of another shape, with a buffer."""

    def _after_update(self, update_counter):
        if update_counter.update == 3:
            torch.manual_seed(1)
            self.model.module[2] = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 10))
            self.model.module[2].requires_grad_(False)


def test_a_module_that_is_replaced_is_replaced_in_the_average(new_run):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 10))
    callbacks = {"recorder": Recorder, "replaces": Replaces, "ema": partial(Ema, decays=[0.5], warmup=False)}
    run = new_run(callbacks, module=module, max_updates=6).train()
    average, live, history = run["ema"].models["ema"].module, run.model.module, run["recorder"].history
    wanted = expected([update for update in history if "1.weight" in update], "1.weight", 0.5, False)
    torch.testing.assert_close(average[1].weight.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(average[2][0].weight, live[2][0].weight)
    assert average[2][1].num_batches_tracked == live[2][1].num_batches_tracked == 3


class Halves(nn.Module):
    """Has two modules, of which one has running statistics, and a mask with infinities."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
        self.encoder.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.head = nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10))

    def forward(self, x):
        return self.head(self.encoder(x))


def test_before_its_start_it_is_the_live_model_and_then_it_moves_at_its_interval(new_run):
    ema = partial(Ema, decays=[0.5], warmup=False, start_update=3, every_n_updates=2)
    accuracy = partial(Accuracy, dataset_key="test", every_n_updates=1)
    run = new_run({"ema": ema, "accuracy": accuracy, "recorder": Recorder}, max_updates=8).train()
    at = [weights["layer.weight"] for weights in run["recorder"].history]
    torch.testing.assert_close(
        run["ema"].models["ema"].module.layer.weight, at[3] / 8 + at[4] / 8 + at[6] / 4 + at[8] / 2
    )
    live, average = run.metric("accuracy/test"), run.metric("accuracy/test/ema")
    assert [average[update] == live[update] for update in (1, 2, 3)] == [True] * 3
    assert average[7] == average[6] != average[8]


@pytest.mark.parametrize("pattern", ["encoder", "enc*"])
def test_only_the_chosen_modules_are_averaged_and_the_rest_is_the_live_model(new_run, pattern):
    ema = partial(Ema, decays=[0.9], modules=[pattern])
    run = new_run({"ema": ema, "recorder": Recorder}, module=Halves(), max_updates=5).train()
    live, average, history = run.model.module, run["ema"].models["ema"].module, run["recorder"].history
    wanted = expected(history, "encoder.1.weight", 0.9, True)
    torch.testing.assert_close(average.encoder[1].weight.double(), wanted, rtol=0, atol=1e-5)
    assert average.head[0].weight is live.head[0].weight
    for name in ("encoder.2.running_mean", "head.1.running_mean"):
        assert torch.equal(average.get_buffer(name), live.get_buffer(name))
    stored = load_file(next(run.paths.checkpoints_dir.glob("E*_U5_*")) / "ema.safetensors")
    assert {name.partition(".")[0] for name in stored} == {"encoder"}


def test_buffers_are_averaged_if_asked_but_for_counts_and_infinities(new_run):
    ema = partial(Ema, decays=[0.9], average_buffers=True, modules=["encoder"])
    run = new_run({"ema": ema, "recorder": Recorder}, module=Halves(), max_updates=5).train()
    average, history = run["ema"].models["ema"].module, run["recorder"].history
    wanted = expected(history, "encoder.2.running_var", 0.9, True)
    torch.testing.assert_close(average.encoder[2].running_var.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(average.head[1].running_var, history[-1]["head.1.running_var"])
    assert average.encoder[2].num_batches_tracked == 5
    assert average.encoder.mask.tolist() == [0.0, -torch.inf]


@pytest.mark.parametrize("stop_at", [2, 4])
def test_an_average_of_a_module_is_resumed_before_and_after_its_start(new_run, stop_at):
    ema = partial(Ema, modules=["encoder"], average_buffers=True, start_update=3, every_n_updates=2)
    callbacks = {"ema": ema, "accuracy": partial(Accuracy, dataset_key="test", every_n_updates=1)}

    def train(run_id, stop_at=None):
        torch.manual_seed(0)
        return new_run(callbacks, run_id, module=Halves(), max_updates=8, stop_at=stop_at).train()

    whole = train("whole")
    train("cut", stop_at)
    resumed = train("cut")
    assert resumed.metric("accuracy/test/ema") == whole.metric("accuracy/test/ema")
    name = whole.paths.latest.read_text().strip()
    one, other = (run.paths.checkpoints_dir / name / "ema.safetensors" for run in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modules": ["lyer"]}, r"callbacks\.ema\.modules: 'lyer' matches no module\. Did you mean 'layer'"),
        ({"every_n_updates": 0}, "every_n_updates: a whole number of at least 1"),
        ({"start_update": -1}, "start_update: a whole number of at least 0 is needed, not -1"),
    ],
)
def test_a_start_interval_or_module_that_cannot_be_is_refused(new_run, given, message):
    with pytest.raises(ConfigError, match=message):
        new_run({"ema": partial(Ema, **given)})
