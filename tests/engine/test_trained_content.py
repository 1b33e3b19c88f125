"""Checkpoints with only what is trained: who reads one gets the whole model bit for bit, or an error."""

from functools import partial

import pytest
import safetensors.torch
import torch
from torch import nn

from callbacks.ema import Ema
from ksuit_runner import CallbackBase, run
from ksuit_runner.checkpoint.format import _check_shape, read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError, ConfigError
from ksuit_runner.models.mlp import Mlp
from ksuit_runner.paths import PathProvider
from ksuit_runner.trainer.stored_weights import weights_at

TRAINED = {"checkpoint": {"every_n_updates": 1, "keep_last": 9, "content": "trained"}, "max_updates": 6}


def network(seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    body[0].requires_grad_(False)
    return nn.Sequential(body, nn.Linear(8, 3))


FREEZE = {"a": {"match": ["0.2.*"]}, "late": {"match": ["0.3.*"], "until_epoch": 1}}
LEFT_OUT = {"0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"}


class Shift(CallbackBase):
    """Changes a frozen weight after an update."""

    def _after_update(self, update_counter):
        if update_counter.update == 2:
            self.model.module[0][2].weight.mul_(2)


def files(maker, update, run_id="run00000"):
    folder = maker.paths(run_id).at_checkpoint(f"E{update // 3}_U{update}_S{update * 6}").checkpoint_dir
    return {name: safetensors.torch.load_file(folder / f"{name}.safetensors") for name in ("model", "ema")}


def test_what_is_frozen_for_good_is_left_out_and_a_resume_is_exact(maker, bits):
    make = partial(maker.run, {"ema": (Ema, {})}, freeze=FREEZE)
    whole = make(run_id="whole", model=network(), checkpoint={"every_n_updates": 1, "keep_last": 9}, max_updates=6)
    train(whole)
    small = make(model=network(), **TRAINED)
    train(small)
    for tensors in files(maker, 2).values():
        assert network().state_dict().keys() - tensors.keys() == LEFT_OUT
    assert read_newest(maker.paths()).base.keys() == LEFT_OUT
    with (
        weights_at(whole.trainer, read_newest(maker.paths("whole"), "E0_U2_S12")) as expected,
        weights_at(small.trainer, read_newest(maker.paths(), "E0_U2_S12")) as found,
    ):
        assert all(bits(found[name].tensors()) == bits(expected[name].tensors()) for name in ("", "ema"))
    resumed = maker.resumed({"ema": (Ema, {})}, update=2, model=network(), freeze=FREEZE, **TRAINED)
    train(resumed)
    assert bits(resumed.trainer.model.tensors()) == bits(whole.trainer.model.tensors())
    assert bits(resumed.hooks.callbacks["ema"].models["ema"].tensors()) == bits(
        whole.hooks.callbacks["ema"].models["ema"].tensors()
    )
    last = "E2_U6_S36"
    paths = maker.paths(), maker.paths("run00000-resumed")
    first, second = (sorted(path.at_checkpoint(last).checkpoint_dir.iterdir()) for path in paths)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_base_that_differs_is_refused(maker):
    make = partial(maker.run, freeze=FREEZE, **TRAINED)
    train(make(model=network()))
    with pytest.raises(CheckpointError, match=r"model: .* '0.0.weight' is not what its run began with"):
        make(model=network(seed=1), resume=True)


@pytest.mark.parametrize("base", [["0.0.weight"], {"0.0.weight": 1}])
def test_checksums_that_are_none_count_as_damage(base):
    with pytest.raises(ValueError, match="are no texts"):
        _check_shape({"trainer": {}, "callbacks": {}, "base": base})


def test_a_frozen_weight_that_a_callback_changes_is_stored(maker):
    make = partial(maker.run, {"ema": (Ema, {}), "shift": (Shift, {})}, freeze=FREEZE, **TRAINED)
    train(make(model=network()))
    assert "0.2.weight" not in files(maker, 1)["model"]
    changed = files(maker, 3)["model"]["0.2.weight"]
    assert torch.equal(changed, 2 * network()[0][2].weight)
    assert torch.equal(make(model=network(), resume=True).trainer.model.module[0][2].weight, changed)


def test_resume_fork_evaluate_and_initialize_rebuild_the_whole(tmp_path):
    here, file = f"output_dir={tmp_path}", tmp_path / "pretrained.safetensors"
    torch.manual_seed(1)
    body = {name: value for name, value in Mlp((1, 8, 8), (10,)).state_dict().items()}
    safetensors.torch.save_file(body, file)
    names = list(body)
    frozen = [name for name in names if not name.startswith(names[-1].rpartition(".")[0])]
    given = [
        here,
        "model=mlp",
        "callbacks=[ema,accuracy]",
        f"initialize.from={file}",
        "data.num_workers=0",
        "tracker=noop",
    ]
    given += [f"trainer.freeze=[{','.join(frozen)}]", "trainer.max_epochs=1"]
    whole = run([*given, "name=whole"])
    small = run([*given, "name=small", "checkpoint.content=trained"])

    def model(result):
        return read_newest(PathProvider(tmp_path, result.run_id))

    assert model(whole).model.keys() - model(small).model.keys() == set(frozen)
    for what in ("evaluate", "fork"):
        results = [run([here, f"{what}={name}"]) for name in ("whole", "small")]
        values = [{key: item.last for key, item in result.metrics.items() if "accuracy" in key} for result in results]
        assert values[0] == values[1] and len(values[0]) >= 2
    begun = [
        run([*given[:2], "tracker=noop", "callbacks=[]", "trainer.max_updates=0", f"initialize.from={name}"])
        for name in ("whole", "small")
    ]
    first, second = (model(result).model for result in begun)
    assert all(torch.equal(first[name], second[name]) for name in names)
    file.rename(moved := tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match="initialize.from: there is no file"):
        run([here, f"resume={small.run_id}", "trainer.max_epochs=2"])
    longer = run([here, f"resume={small.run_id}", "trainer.max_epochs=2", f"initialize.from={moved}"])
    assert model(longer).progress.epoch == 2 and model(longer).base.keys() == set(frozen)
    safetensors.torch.save_file({name: value + 1 for name, value in body.items()}, moved)
    with pytest.raises(ConfigError, match="initialize.checksum: .* is not the file that is meant"):
        run([here, f"evaluate={small.run_id}"])
