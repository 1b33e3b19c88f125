"""``export=``, and whatever else a single process does with a run, if one process or several ranks have written it."""

import shutil

import pytest
import torch
import yaml
from pieces import piece
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from worlds import in_threads

from ksuit_runner import load_model, run
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.checkpoint.manifest import rank_of
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.cli.export import export
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, StorageError
from ksuit_runner.models.export_files import read_onnx
from ksuit_runner.paths import PathProvider

FEW = ("model=linear", "trainer.max_epochs=2", "tracker=noop", "name=first", "callbacks=[ema,best_checkpoint,accuracy]")
NEWEST = "E2_U40_S2560"


def spread(paths, ranks):
    """Write the newest checkpoint of a run anew, as so many ranks do that hold pieces of everything."""
    stored = read_newest(paths)
    ema = load_file(paths.checkpoints_dir / NEWEST / "ema.safetensors")

    def save(world):
        def own(tensors):
            return {
                name: piece(value, world.rank, world.size) if value.ndim else value for name, value in tensors.items()
            }

        counter = UpdateCounter(1295, 64, max_epochs=2)
        counter.update = 40
        writer = CheckpointWriter(paths, world=world, config_hash=stored.config_hash)
        writer.add_tensors("ema", lambda: own(ema), of_model=True)
        trainer = dict(stored.state["trainer"])
        optimizer = dict(trainer["optimizer"])
        optimizer["parameters"] = {name: own(values) for name, values in optimizer["parameters"].items()}
        state = {**stored.state, "trainer": {**trainer, "optimizer": optimizer}}
        writer.save(counter, own(stored.model), state, wait=True)
        writer.close()

    in_threads(ranks, save)
    assert sum(rank_of(path.name) is not None for path in (paths.checkpoints_dir / NEWEST).iterdir()) == 2 * ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of one process, and the same one with a checkpoint of three ranks."""
    one, other = (tmp_path_factory.mktemp("outputs") / "runs" for _ in range(2))
    run([f"output_dir={one.parent}", *FEW])
    shutil.copytree(one.parent, other.parent, dirs_exist_ok=True)
    (run_dir,) = other.iterdir()
    spread(PathProvider(other.parent, run_dir.name), 3)
    return [one.parent, other.parent]


@pytest.mark.parametrize("weights", ["", "/ema"])
def test_the_exported_file_is_what_the_plain_module_loads(folders, tmp_path, monkeypatch, capsys, weights):
    monkeypatch.chdir(tmp_path)
    contents = []
    for folder in folders:
        assert export(f"first{weights}", [f"output_dir={folder}"]) == 0
        (file,) = tmp_path.iterdir()
        assert str(file) in capsys.readouterr().out.replace("\n", "")
        assert file.name.endswith(f"_{NEWEST}_{weights[1:] or 'model'}.safetensors")
        tensors = load_file(file)
        module = load_model(f"first{weights}", output_dir=folder)
        expected = {name: value.clone() for name, value in module.state_dict().items()}
        assert tensors.keys() == expected.keys()
        with safe_open(file, "pt") as opened:
            told = yaml.safe_load(opened.metadata()["config"])
        assert told["model"]["_target_"].endswith("Linear") and "output_dir" not in told
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
        module.load_state_dict(tensors)
        contents.append(file.read_bytes())
        file.unlink()
    assert contents[0] == contents[1], "the file depends on who has written the checkpoint"


@pytest.mark.parametrize("form", ["torch_export", "mlflow", "onnx"])
def test_what_needs_no_code_computes_what_the_module_does(folders, tmp_path, monkeypatch, capsys, form):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    assert export("first/ema", [f"output_dir={folders[1]}", f"export_as={form}"]) == 0
    (target,) = tmp_path.iterdir()
    assert str(target) in capsys.readouterr().out.replace("\n", "")
    inputs = torch.linspace(0, 1, 5 * 64).reshape(5, 1, 8, 8)
    if form == "onnx":
        (found,) = read_onnx(target)(inputs)
    else:
        file = target / "data/model.pt2" if form == "mlflow" else target
        found = torch.export.load(file).module()(inputs)
    torch.testing.assert_close(found, load_model("first/ema", output_dir=folders[1])(inputs), rtol=1e-4, atol=1e-5)


def test_a_file_that_computes_something_else_gets_no_name(folders, tmp_path, monkeypatch):
    sizes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    other = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (torch.zeros(2, 1, 8, 8),), **sizes)
    monkeypatch.setattr(
        "ksuit_runner.models.export_files.write_program", lambda file, program: torch.export.save(other, file)
    )
    with pytest.raises(ConfigError, match="computes something else"):
        export("first", [f"output_dir={folders[0]}", f"export_to={tmp_path / 'model.pt2'}"])
    with pytest.raises(ConfigError, match="Did you mean 'onnx'"):
        export("first", [f"output_dir={folders[0]}", "export_as=onx"])
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_half_written_stays(folders, tmp_path, monkeypatch):
    one, target = f"output_dir={folders[0]}", tmp_path / "weights.safetensors"
    assert export("first@best", [one, f"export_to={target}"]) == 0
    before = target.read_bytes()
    for export_to, problem in (
        (target, "exists, and is not overwritten"),
        (tmp_path / "weights.pt", "has to end in .safetensors"),
        (tmp_path / "nowhere" / "x.safetensors", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=problem):
            export("first", [one, f"export_to={export_to}"])
    with pytest.raises(ConfigError, match="Did you mean 'ema'"):
        export("first/emma", [one, f"export_to={tmp_path / 'x.safetensors'}"])
    monkeypatch.setattr(
        "ksuit_runner.checkpoint.tensor_file.sync", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(StorageError, match=r"x\.safetensors: full"):
        export("first", [one, f"export_to={tmp_path / 'x.safetensors'}"])
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == before


def test_frozen_weights_that_are_not_in_the_checkpoint_are_in_the_file(tmp_path):
    run(
        [
            f"output_dir={tmp_path}",
            *FEW[:4],
            "callbacks=[]",
            "trainer.freeze=[layer.bias]",
            "checkpoint.content=trained",
        ]
    )
    target = tmp_path / "whole.safetensors"
    export("last", [f"output_dir={tmp_path}", f"export_to={target}"])
    (folder,) = (tmp_path / "runs").iterdir()
    assert "layer.bias" not in load_file(folder / "artifacts" / "checkpoints" / NEWEST / "model.safetensors")
    assert load_file(target).keys() == load_model("last", output_dir=tmp_path).state_dict().keys()


def test_a_single_process_resumes_and_begins_with_what_ranks_have_written(folders):
    ends = []
    for folder in folders:
        begun = run(
            [f"output_dir={folder}", *FEW[:3], "initialize.from=first/ema", "trainer.max_updates=0", "name=other"]
        )
        ends.append([read_newest(PathProvider(folder, begun.run_id)).model])
        done = run(["resume=first", f"output_dir={folder}", "trainer.max_epochs=3"])
        checkpoint = read_newest(PathProvider(folder, done.run_id))
        assert checkpoint.progress.update == 60
        ends[-1] += [checkpoint.model, checkpoint.state["trainer"]["optimizer"]["parameters"]["layer.weight"]]
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
