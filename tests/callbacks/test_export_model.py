import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import mlflow
import pytest
import torch
from torch import nn

from callbacks.ema import Ema
from callbacks.export_model import ExportModel
from ksuit_runner import load_model, run
from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.testing import tiny_run
from ksuit_runner.tracker.mlflow import MlflowTracker

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


class Branches(nn.Module):
    """Does something else for other values, which a program cannot."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        outputs = self.layer(x.flatten(1))
        return outputs if outputs.sum() > 0 else -outputs


@pytest.mark.parametrize(
    ("given", "module", "message"),
    [
        ({"weights": "emma"}, None, r"callbacks\.export\.weights: there are no weights 'emma'\. Did you mean 'ema'"),
        ({"batch_size": 1}, None, "2 or more"),
        ({"alias": "champion"}, None, "add register_as"),
        ({"register_as": "digits"}, None, "only tracker=mlflow"),
        ({}, Branches(), r"callbacks\.export: torch\.export cannot export the model"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(tmp_path, given, module, message):
    callbacks = {"ema": Ema, "export": partial(EXPORT, **given)}
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, callbacks, module=module, max_updates=2).train()
    assert not list(tmp_path.rglob("*.safetensors"))
