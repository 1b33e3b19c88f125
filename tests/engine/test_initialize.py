"""Weights that a new run begins with: which fit, what is said of those that do not, and what is stored."""

import shutil
import sqlite3

import pytest
import safetensors.torch
import torch
from torch import nn

from ksuit_runner.api import run
from ksuit_runner.checkpoint.folders import names
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.config.check.initialization import Initialization, initialization_of
from ksuit_runner.engine.initialize import fit_weights, read_file
from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.stored_run import read_config
from ksuit_runner.resume.starting_point import with_starting_point
from ksuit_runner.sweep.build_plan import plan_sweep


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)


def source(**renamed):
    torch.manual_seed(5)
    return {key: value.clone() for key, value in Net().state_dict().items()}


def fit(values, model=None, **settings):
    return fit_weights(values, ModelBase(model or Net()), Initialization("source", **settings))


def test_everything_fits_or_what_does_not_is_named():
    whole = fit(source())
    assert (len(whole.given), list(whole.kept), list(whole.unused)) == (9, [], [])
    values = {**source(), "extra.weight": torch.ones(1)}
    del values["head.bias"]
    with pytest.raises(ConfigError, match=r"the model has no extra.weight; the source has no head.bias"):
        fit(values)
    loose = fit(values, strict=False)
    assert (list(loose.kept), list(loose.unused)) == (["head.bias"], ["extra.weight"])
    line = "initialize: 8 of 9 weights from a; as the model makes them: head.bias; not used: extra.weight"
    assert loose.report("a") == line
    with pytest.raises(ConfigError, match="no weight fits"):
        fit({"other": torch.ones(1)}, strict=False)


@pytest.mark.parametrize("in_source", [True, False])
def test_dropped_weights_stay_as_the_model_makes_them(in_source):
    values = source() if in_source else {key: value for key, value in source().items() if "head" not in key}
    found = fit(values, drop=("head.*",))
    assert set(found.kept) == {"head.weight", "head.bias"} and len(found.given) == 7
    with pytest.raises(ConfigError, match=r"initialize.drop: 'haed.\*' matches no name. Did you mean 'head'"):
        fit(values, drop=("haed.*",))


def test_a_shape_that_differs_is_an_error_whatever_is_strict():
    values = {**source(), "head.weight": torch.ones(5, 3)}
    with pytest.raises(ConfigError, match=r"'head.weight' has shape \(2, 3\) in the model, and \(5, 3\) "):
        fit(values, strict=False)


def test_complex_weights_do_not_lose_half_of_themselves():
    with pytest.raises(ConfigError, match="'head.weight' is real in the model, and complex in the source"):
        fit({**source(), "head.weight": torch.ones(2, 3, dtype=torch.complex64)})


def test_names_are_matched_by_patterns():
    values = {f"net.{key}".replace("body.0", "layers.0.conv"): value for key, value in source().items()}
    found = fit(values, rename={"net.layers.*.conv.*": "body.*.*", "net.*": "*"})
    assert set(found.given) == set(source())
    with pytest.raises(ConfigError, match=r"both become 'head.bias'"):
        fit({**source(), "top.bias": torch.ones(2)}, rename={"top.*": "head.*"})
    with pytest.raises(ConfigError, match=r"initialize.rename: 'nett.\*' matches no name. Did you mean 'net'"):
        fit(values, rename={"nett.*": "*"})


def test_a_prefix_that_one_side_lacks_is_suggested():
    with pytest.raises(ConfigError, match=r"Perhaps initialize.rename has to have module\.\*: '\*'"):
        fit({f"module.{key}": value for key, value in source().items()})
    with pytest.raises(ConfigError, match=r"Perhaps initialize.rename has to have '\*': body\.\*"):
        fit({key[5:]: value for key, value in source().items() if key[:5] == "body."}, drop=("head.*",))


def test_tied_weights_are_given_by_either_name():
    model = Net()
    model.copy = nn.Linear(3, 2)
    model.copy.weight, model.copy.bias = model.head.weight, model.head.bias
    found = fit(source(), model)
    ModelBase(model).load({**model.state_dict(), **found.given})
    assert torch.equal(model.copy.weight, source()["head.weight"])


def test_a_torch_file_is_read_without_executing_it(tmp_path):
    file, weights = tmp_path / "weights.pt", source()
    torch.save(weights, file)
    assert read_file(file).keys() == weights.keys()
    torch.save({"epoch": 3, "state_dict": weights}, file)
    assert read_file(file).keys() == weights.keys()
    torch.save({"model": weights, "ema": weights}, file)
    with pytest.raises(ConfigError, match="initialize.key: several entries hold weights: model, ema"):
        read_file(file)
    assert read_file(file, "ema").keys() == weights.keys()
    with pytest.raises(ConfigError, match="no entry 'emma'. Did you mean 'ema'"):
        read_file(file, "emma")
    torch.save(Net(), file)
    with pytest.raises(ConfigError, match="can be read without executing code"):
        read_file(file)
    torch.save([1], file)
    with pytest.raises(ConfigError, match="holds no weights by name"):
        read_file(file)
    for name, content in (("weights.safetensors", b"x"), ("weights.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("first", "a mapping is needed, not 'first'. Write initialize.from=first"),
        ({"form": "a"}, "initialize.form: there is no such setting. Did you mean 'from'"),
        ({"from": "a", "strict": "maybe"}, "initialize.strict: expects true or false"),
        ({"from": "a", "rename": {"a.*": "b"}}, "need the same number of"),
    ],
)
def test_mistakes_are_found_before_torch_is_imported(node, says):
    with pytest.raises(ConfigError, match=says):
        initialization_of({"initialize": node})


def test_a_file_is_the_one_that_is_meant(tmp_path):
    file = tmp_path / "weights.safetensors"
    config = {"output_dir": str(tmp_path), "initialize": {"from": str(file)}}
    with pytest.raises(ConfigError, match="initialize.from: there is no file"):
        with_starting_point(config)
    safetensors.torch.save_file(source(), file)
    fixed = with_starting_point(config)
    assert with_starting_point(fixed) == fixed
    safetensors.torch.save_file({"other": torch.ones(1)}, file)
    with pytest.raises(ConfigError, match="initialize.checksum: .* is not the file that is meant"):
        with_starting_point(fixed)


def test_a_run_begins_with_the_weights_of_another(paths):
    small = [f"output_dir={paths.output_dir}", "model=linear", "callbacks=[ema,accuracy,best_checkpoint]"]
    first = run([*small, "trainer.max_epochs=1", "name=first"])
    held = PathProvider(paths.output_dir, first.run_id)
    (name,) = names(held)
    held = held.at_checkpoint(name)
    with pytest.raises(KsuitError, match="has no weights 'emma'. Did you mean 'ema'"):
        run([*small, "trainer.max_updates=2", "initialize.from=first@best/emma"])
    begun = [*small, "trainer.max_updates=0", "initialize.from=last@best/ema"]
    second = run(begun)
    paths2 = PathProvider(paths.output_dir, second.run_id)
    averages = safetensors.torch.load_file(held.checkpoint_dir / "ema.safetensors")
    model = read_newest(paths2).model
    assert all(torch.equal(model[key], value) for key, value in averages.items())
    fixed = f"{first.run_id}@{name}/ema"
    assert read_config(paths2).initialize["from"] == fixed
    with sqlite3.connect(paths.database) as database:
        tags = database.execute("select run_uuid, key, value from tags where key like 'ksuit.initialized%'").fetchall()
    link = (first.run_id, f"ksuit.initialized.{second.run_id[:8]}", second.run_id)
    assert set(tags) == {(second.run_id, "ksuit.initialized_from", fixed), link}
    for job in plan_sweep([*begun[:-1], "initialize.from=first", "seed=0,1"], "").jobs:
        assert job.config["initialize"]["from"] == f"{first.run_id}@{name}/model"
    with pytest.raises(ConfigError, match="initialize.strict: fork=.* takes all weights from the checkpoint"):
        run([small[0], f"fork={second.run_id}", "initialize.strict=false"])
    shutil.rmtree(held.run_dir)
    run([small[0], f"resume={second.run_id}", "trainer.max_updates=2"])
    assert read_newest(paths2).progress.update == 2
    shutil.rmtree(paths2.checkpoints_dir)  # as if it had been killed before its first one
    with pytest.raises(KsuitError, match=f"initialize.from={first.run_id}: there is no such run"):
        run([small[0], f"resume={second.run_id}"])
