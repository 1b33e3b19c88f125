import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import UserDict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlflow
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from callbacks.ema import Ema
from callbacks.export_model import ExportModel
from ksuit_runner import load_model, run
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.mlflow_model import export_program
from ksuit_runner.paths import OutputPaths
from ksuit_runner.testing import tiny_run
from ksuit_runner.tracker.mlflow import MlflowTracker
from ksuit_runner.trainer.sgd import SgdTrainer

EXPORT = partial(ExportModel, dataset_key="test")


def test_it_has_the_chosen_weights_and_training_is_unchanged(new_run, digits):
    exported = new_run({"ema": Ema, "export": partial(EXPORT, weights="ema")}, "exported", max_updates=4).train()
    folder, inputs = exported.paths.artifacts_dir / "models/export/E0_U4_S288_ema", digits["test"].inputs[:5]
    program = torch.export.load(folder / "data/model.pt2").module()
    torch.testing.assert_close(program(inputs), exported["ema"].models["ema"](inputs))
    assert json.loads((folder / "input_example.json").read_text()) == digits["test"].inputs[:2].tolist()
    alone = new_run({"ema": Ema}, "alone", max_updates=4).train()
    assert torch.equal(alone.weights["layer.weight"], exported.weights["layer.weight"])


@pytest.fixture(scope="module")
def registered(tmp_path_factory, template):
    """A run of the command line's kind, with MLflow's store, that registers the weights of its best checkpoint."""
    folder = shutil.copytree(template, tmp_path_factory.mktemp("registered") / "outputs")
    given = ["model=mlp", "trainer.max_updates=10", "callbacks=[ema,accuracy,best_checkpoint,export_model]"]
    export = ["weights_of=best", "register_as=digits classifier", "alias=champion"]
    arguments = [f"output_dir={folder}", "+callbacks.accuracy.every_n_updates=5", "trainer.device=cpu"]
    result = run([*arguments, *given, *(f"callbacks.export_model.{item}" for item in export)])
    return folder, result.run_id, result.folder / "artifacts/models/export_model/E0_U10_S640_best"


@pytest.mark.filterwarnings("ignore")  # of modules of MLflow that are imported here
def test_torch_and_mlflow_load_the_registered_version(registered):
    folder, run_id, model = registered
    version = MlflowTracker(OutputPaths(folder))._client.get_model_version_by_alias("digits classifier", "champion")
    assert (str(version.version), version.run_id, version.source) == ("1", run_id, str(model))
    assert f"callbacks.export_model: the model is in {model}\n" in (folder / "runs" / run_id / "run.log").read_text()
    inputs = torch.linspace(0, 1, 192).reshape(3, 1, 8, 8)  # not as many as in the example
    generic = mlflow.pyfunc.load_model(version.source)
    signature = generic.metadata.signature.to_dict()
    assert json.loads(signature["inputs"])[0]["tensor-spec"] == {"dtype": "float32", "shape": [-1, 1, 8, 8]}
    assert json.loads(signature["outputs"])[0]["tensor-spec"] == {"dtype": "float32", "shape": [-1, 10]}
    expected = load_model(f"{run_id}@best", output_dir=folder)(inputs)
    for outputs in (
        torch.export.load(model / "data/model.pt2").module()(inputs),
        mlflow.pytorch.load_model(version.source)(inputs),
        torch.from_numpy(generic.predict(inputs.numpy())),
    ):
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_loads_the_model_that_it_lists(registered):
    folder, run_id, model = registered
    client = MlflowTracker(OutputPaths(folder))._client
    (listed,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert listed.artifact_location == str(model)
    assert listed.tags["ksuit.path"] == "checkpoints/E0_U5_S320"
    inputs = torch.linspace(0, 1, 192).reshape(3, 1, 8, 8)
    expected = load_model(f"{run_id}@best", output_dir=folder)(inputs)
    with using(client.tracking_uri):
        loaded = mlflow.pytorch.load_model(listed.model_uri)
    torch.testing.assert_close(loaded(inputs), expected, rtol=1e-4, atol=1e-5)
    note = listed.tags["mlflow.note.content"]
    assert f'load_model("{run_id}@best")' in note and f'mlflow.pytorch.load_model("{listed.model_uri}")' in note


@contextmanager
def using(uri):
    """Have MLflow look for models in a store."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.slow
def test_mlflow_serves_it_in_a_process_that_knows_nothing_of_its_code(registered):
    folder, run_id, model = registered
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--workers", "1", "--env-manager", "local"]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/digits classifier@champion", *options]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        found = predictions(server, port, (model / "serving_input_example.json").read_bytes())
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    example = torch.tensor(json.loads((model / "input_example.json").read_text()))
    expected = load_model(f"{run_id}@best", output_dir=folder)(example)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


def predictions(server, port, content):
    """Return what a server answers, as soon as it does."""
    address, deadline = f"http://127.0.0.1:{port}/invocations", time.monotonic() + 90
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
    while True:
        try:
            return json.loads(urllib.request.urlopen(request, timeout=30).read())["predictions"]
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)


class Tokens(Dataset):
    """Sequences of different lengths, and the number of their tokens that count."""

    targets = torch.arange(2, 12)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.full((2 + index,), index), self.targets[index]

    def collate_fn(self, samples):
        """Pad them to the longest one."""
        tokens = pad_sequence([tokens for tokens, _ in samples], batch_first=True, padding_value=-1)
        inputs = UserDict(tokens=tokens.clamp(min=0), mask=tokens >= 0)
        return inputs, torch.stack([target for _, target in samples])


class Pooled(nn.Module):
    """Takes tokens and a mask, and returns several tensors in a class of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 12)

    def forward(self, inputs):
        hidden = self.embed(inputs["tokens"]) * inputs["mask"].unsqueeze(-1)
        return UserDict(scores=self.head(hidden.sum(1)), hidden=(hidden,))


class ScoresTrainer(SgdTrainer):
    def training_step(self, batch, model):
        outputs = model(batch[0])
        return self.loss(outputs["scores"], batch[1]), outputs


@pytest.mark.filterwarnings("ignore")  # of modules of MLflow that are imported here
def test_several_tensors_go_in_and_out_by_name_whatever_their_length(tmp_path):
    given = {"trainer_class": ScoresTrainer, "batch_size": 2, "max_updates": 1}
    datasets = {"train": Tokens(), "test": Tokens()}
    done = tiny_run(tmp_path, {"export": EXPORT}, datasets=datasets, module=Pooled(), **given).train()
    folder = done.paths.artifacts_dir / "models/export/E0_U1_S2"
    inputs, _ = Tokens().collate_fn([Tokens()[index] for index in (1, 9, 4)])  # longer than any in the example
    expected = done.model.module.eval()(inputs)
    served = mlflow.pyfunc.load_model(str(folder))
    signature = served.metadata.signature.to_dict()
    assert {item["name"]: item["tensor-spec"] for item in json.loads(signature["inputs"])} == {
        "tokens": {"dtype": "int64", "shape": [-1, -1]},
        "mask": {"dtype": "bool", "shape": [-1, -1]},
    }
    assert [item["name"] for item in json.loads(signature["outputs"])] == ["scores", "hidden/0"]
    found = served.predict({name: tensor.numpy() for name, tensor in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found["scores"]), expected["scores"])
    torch.testing.assert_close(torch.from_numpy(found["hidden/0"]), expected["hidden"][0])
    example = served.predict(served.metadata.load_input_example(str(folder)))
    assert example["hidden/0"].shape == (2, 3, 8)
    program = mlflow.pytorch.load_model(str(folder))  # as torch.export.load, it takes what the model takes
    torch.testing.assert_close(program(dict(inputs))["scores"], expected["scores"])


class Passes(nn.Module):
    """Passes all that it is called with on to another model, as adapters do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_model_that_takes_any_arguments_is_exported():
    model, inputs = Passes().eval(), torch.randn(5, 3)
    torch.testing.assert_close(export_program(model, inputs[:2]).module()(inputs), model(inputs))


class Branches(nn.Module):
    """Does something else for other values, which a program cannot."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        outputs = self.layer(x.flatten(1))
        return outputs if outputs.sum() > 0 else -outputs


class Returns(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layer, self.outputs = nn.Linear(1, 1), outputs

    def forward(self, x):
        return self.outputs


@pytest.mark.parametrize(
    ("given", "module", "message"),
    [
        ({"weights": "emma"}, None, r"callbacks\.export\.weights: there are no weights 'emma'\. Did you mean 'ema'"),
        ({"batch_size": 1}, None, "batch_size: a whole number of at least 2"),
        ({"alias": "champion"}, None, "add register_as"),
        ({"register_as": "digits"}, None, "only tracker=mlflow"),
        ({}, Branches(), r"callbacks\.export: torch\.export cannot export the model"),
        ({}, Returns({"a": [1]}), r"callbacks\.export: the model returns int at 'a/0': only tensors"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(tmp_path, given, module, message):
    callbacks = {"ema": Ema, "export": partial(EXPORT, **given)}
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, callbacks, module=module, max_updates=2).train()
    assert not list(tmp_path.rglob("*.safetensors"))
