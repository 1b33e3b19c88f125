"""What is there after training: the model of a run, its metrics, and the table of runs."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ksuit_runner import load_model, metrics, run, runs
from ksuit_runner.cli.export import export
from ksuit_runner.cli.predict import predict
from ksuit_runner.errors import ConfigError, KsuitError, ResumeError
from ksuit_runner.models.linear import Linear
from ksuit_runner.paths import PathProvider

FEW = ("model=linear", "trainer.max_epochs=2", "tracker=noop", "name=first", "trainer.freeze=[layer.bias]")


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("it's, here")
    run(
        [
            f"output_dir='{str(folder).replace(chr(39), chr(92) + chr(39))}'",
            *FEW,
            "callbacks=[ema,accuracy,best_checkpoint]",
        ]
    )
    return folder


@pytest.fixture
def paths(output_dir):
    (folder,) = (output_dir / "runs").iterdir()
    return PathProvider(output_dir, folder.name)


def stored(paths, weights):
    return load_file(paths.checkpoints_dir / paths.latest.read_text().strip() / f"{weights}.safetensors")


@pytest.mark.parametrize(
    ("reference", "weights", "file"),
    [
        ("last", None, "model"),
        ("first@best", None, "model"),
        ("first/ema", None, "ema"),
        ("first@latest", "ema", "ema"),
    ],
)
def test_a_model_is_the_plain_module_with_the_stored_weights(output_dir, paths, monkeypatch, reference, weights, file):
    monkeypatch.setattr("ksuit_runner.data.digits.Digits.__init__", lambda *_, **__: pytest.fail("it reads data"))
    before = torch.get_rng_state()
    model = load_model(reference, weights, output_dir)
    assert type(model) is Linear and not any(module.training for module in model.modules())
    for name, value in stored(paths, file).items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(torch.get_rng_state(), before)
    assert model(torch.zeros(3, *json.loads(paths.shapes.read_text())["input_shape"])).shape == (3, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("firts",), ResumeError, "Did you mean 'first'"),
        (("first@bset",), ConfigError, "Did you mean 'best'"),
        (("first", "emma"), ConfigError, "has no weights 'emma'. Did you mean 'ema'"),
        (("first/ema", "average"), ConfigError, "names the weights 'ema'"),
    ],
)
def test_what_is_not_there_is_said_with_the_nearest_name(output_dir, arguments, error, words):
    with pytest.raises(error, match=words):
        load_model(*arguments, output_dir=output_dir)


def test_a_run_without_stored_shapes_says_what_to_do(output_dir, paths):
    text = paths.shapes.read_text()
    for content in (None, '{"input_shape": "wide"}'):
        paths.shapes.unlink() if content is None else paths.shapes.write_text(content)
        with pytest.raises(KsuitError, match="input_shape" if content is None else "shapes.json"):
            load_model("first", output_dir=output_dir)
    paths.shapes.write_text(text)


NET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, output_shape):
        super().__init__(nn.Flatten(), nn.Linear(64, output_shape[0]))
"""


def test_a_model_of_the_project_is_found_by_a_script_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # without the working directory
    run(["model=linear", "model._target_=own_net.Net", "trainer.max_epochs=1", "callbacks=[]", "tracker=noop"])
    monkeypatch.delitem(sys.modules, "own_net")
    before = sys.path[:]
    assert type(load_model("last")).__name__ == "Net" and sys.path == before


def test_a_checkpoint_of_only_what_was_trained_is_completed(tmp_path):
    run([f"output_dir={tmp_path}", *FEW, "callbacks=[]", "checkpoint.content=trained"])
    (folder,) = (tmp_path / "runs").iterdir()
    paths = PathProvider(tmp_path, folder.name)
    model = load_model("last", output_dir=tmp_path)
    assert set(stored(paths, "model")) < set(model.state_dict())


def test_a_model_has_the_weights_that_were_evaluated_and_not_those_that_training_goes_on_with(tmp_path):
    pytest.importorskip("schedulefree")
    optimizer = ["optimizer._target_=schedulefree.AdamWScheduleFree", "optimizer.lr=0.02", "schedule=constant"]
    here = f"output_dir={tmp_path}"
    run([here, *FEW[:3], "callbacks=[loss]", *optimizer])
    (folder,) = (tmp_path / "runs").iterdir()
    model = load_model("last", output_dir=tmp_path)
    assert not torch.equal(model.layer.weight, stored(PathProvider(tmp_path, folder.name), "model")["layer.weight"])
    predict("last", [here, f"export_to={tmp_path / 'out.npz'}"])
    with np.load(tmp_path / "out.npz") as found:
        outputs, targets = (torch.from_numpy(found[name]) for name in ("outputs", "targets"))
    recorded = metrics("last", tmp_path)["loss/validation"].iloc[-1]
    assert nn.functional.cross_entropy(outputs, targets).item() == pytest.approx(recorded, rel=1e-5)
    export("last", [here, f"export_to={tmp_path / 'out.safetensors'}"])
    assert torch.equal(load_file(tmp_path / "out.safetensors")["layer.weight"], model.layer.weight)


def test_metrics_are_those_of_the_journal(output_dir, paths):
    table = metrics("first", output_dir)
    lines = [json.loads(line) for line in paths.journal.read_text().splitlines()]
    points = {(key, line["s"]): value for line in lines for key, value in line["m"].items()}
    assert table.index.name == "update" and list(table.index) == sorted({step for _, step in points})
    for (key, step), value in points.items():
        assert table.loc[step, key] == value
    assert int(table.count().sum()) == len(points)
    assert math.isnan(table.loc[30, "accuracy/validation"])


def test_all_runs_are_a_table(output_dir, paths):
    table = runs(output_dir)
    row = table.loc[paths.run_id]
    assert (row["name"], row["status"], row["checkpoint"]) == ("first", "FINISHED", "E2_U40_S2560")
    assert row["accuracy/validation"] == metrics("last", output_dir)["accuracy/validation"].iloc[-1]
    assert np.issubdtype(table["started"].dtype, np.datetime64) and row["objective"] == "accuracy/validation"
    assert row["best"] == metrics("last", output_dir)["accuracy/validation"].max()
    assert np.issubdtype(table["took"].dtype, np.timedelta64) and pd.Timedelta(0) < row["took"] < row["age"]
    assert runs(Path(output_dir) / "nothing").empty
    assert isinstance(load_model(table.index[0][:8], output_dir=output_dir), nn.Module)


def test_a_yaml_file_that_has_changed_since_the_last_call_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = tmp_path / "conf/tracker/mlflow.yaml"
    tracker.parent.mkdir(parents=True)
    for uri, error in (("null", "there is no run"), ("http://nowhere", "nowhere.Tracker")):
        tracker.write_text(f"_target_: nowhere.Tracker\nuri: {uri}\n")  # which is asked only if it has an address
        for find in (metrics, load_model):
            with pytest.raises(KsuitError, match=error):
                find("a" * 12, output_dir=tmp_path)
