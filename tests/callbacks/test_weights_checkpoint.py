import logging
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from callbacks.ema import Ema
from callbacks.weights_checkpoint import WeightsCheckpoint
from ksuit_runner.errors import ConfigError

EVERY = partial(WeightsCheckpoint, weights=["model", "ema"], every_n_updates=4, at_end=True, keep_last=3)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.encoder(x.flatten(1)))


def files(run, name="weights"):
    folder = run.paths.artifacts_dir / "weights" / name
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_newest_ones_are_kept_and_load_into_the_plain_module(new_run):
    run = new_run({"ema": Ema, "weights": EVERY}, module=Chain(), max_updates=18).train()
    ends = ("E0_U12_S864", "E0_U16_S1152", "E0_U18_S1296")
    assert files(run).keys() == {f"{end}/{name}.safetensors" for end in ends for name in ("model", "ema")}
    plain = Chain()
    plain.load_state_dict(load_file(run.paths.artifacts_dir / "weights/weights/E0_U18_S1296/ema.safetensors"))
    average = run["ema"].models["ema"].module
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in plain.state_dict().items())


def test_a_resumed_run_leaves_the_same_files_and_training_is_unchanged(new_run):
    callbacks = {"ema": Ema, "weights": EVERY}
    kept = {"checkpoint": {"every_n_updates": 5}}
    whole = new_run(callbacks, "whole", module=Chain(), max_updates=18).train()
    cut = new_run(callbacks, "cut", module=Chain(), max_updates=18, stop_at=9, **kept).train()
    left_over = cut.paths.artifacts_dir / "weights/weights/E0_U13_S936"  # of a life that a kill has taken back
    left_over.mkdir()
    resumed = new_run(callbacks, "cut", module=Chain(), max_updates=18, **kept).train()
    assert files(resumed) == files(whole)
    assert not left_over.exists()
    alone = new_run({}, "alone", module=Chain(), max_updates=18).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


def test_chosen_modules_under_another_name(new_run):
    other = partial(WeightsCheckpoint, modules=["enc*"], every_n_updates=2, keep_last=None)
    run = new_run({"encoders": other}, module=Chain(), max_updates=4).train()
    assert sorted(files(run, "encoders")) == ["E0_U2_S144/model.safetensors", "E0_U4_S288/model.safetensors"]
    stored = load_file(run.paths.artifacts_dir / "weights/encoders/E0_U4_S288/model.safetensors")
    assert stored.keys() == {"encoder.weight", "encoder.bias"}
    assert torch.equal(stored["encoder.weight"], run.model.module.encoder.weight)


def test_a_disk_that_takes_nothing_does_not_end_the_run(new_run, caplog):
    run = new_run({"weights": partial(WeightsCheckpoint, every_n_updates=4)}, max_updates=8)
    run.paths.artifacts_dir.mkdir(parents=True, exist_ok=True)
    (run.paths.artifacts_dir / "weights").write_text("")
    with caplog.at_level(logging.ERROR, "ksuit_runner"):
        run.train()
    assert ["could not be written" in message for message in caplog.messages] == [True, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": ["emma"]}, r"callbacks\.weights\.weights: there are no weights 'emma'\. Did you mean 'ema'"),
        ({"modules": ["lyer"]}, r"callbacks\.weights\.modules: 'lyer' matches no module\. Did you mean 'layer'"),
        ({"keep_last": 0}, "keep_last: a whole number of at least 1 is needed"),
    ],
)
def test_what_cannot_be_written_is_refused_before_training(new_run, given, message):
    with pytest.raises(ConfigError, match=message):
        new_run({"ema": Ema, "weights": partial(WeightsCheckpoint, every_n_updates=1, **given)}).train()
