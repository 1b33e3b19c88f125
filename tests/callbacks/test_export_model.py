"""The exported model is loaded by torch and MLflow, in processes that import nothing of what it was trained with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial

import pytest
import torch
from torch import nn

from callbacks.ema import Ema
from callbacks.export_model import ExportModel
from ksuit_runner import load_model, run
from ksuit_runner.errors import ConfigError
from ksuit_runner.testing import tiny_run

EXPORT = partial(ExportModel, dataset_key="test")


def elsewhere(folder, script):
    """Run a script in a process without this package, which prints one line of JSON, and return that."""
    command = [sys.executable, "-I", "-c", f"import json, torch\n{script}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_it_has_the_chosen_weights_and_training_is_unchanged(new_run, digits):
    exported = new_run({"ema": Ema, "export": partial(EXPORT, weights="ema")}, "exported", max_updates=4).train()
    folder, inputs = exported.paths.artifacts_dir / "models/export/E0_U4_S288_ema", digits["test"].inputs[:5]
    program = torch.export.load(folder / "data/model.pt2").module()
    torch.testing.assert_close(program(inputs), exported["ema"].models["ema"](inputs))
    assert json.loads((folder / "input_example.json").read_text()) == digits["test"].inputs[:2].tolist()
    alone = new_run({"ema": Ema}, "alone", max_updates=4).train()
    assert torch.equal(alone.weights["layer.weight"], exported.weights["layer.weight"])


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A run of the command line's kind, with MLflow's store, that registers the weights of its best checkpoint."""
    folder = tmp_path_factory.mktemp("registered")
    given = ["model=mlp", "trainer.max_updates=10", "callbacks=[ema,accuracy,best_checkpoint,export_model]"]
    export = ["weights_of=best", "register_as=digits classifier", "alias=champion"]
    arguments = [f"output_dir={folder}", "+callbacks.accuracy.every_n_updates=5", "trainer.device=cpu"]
    result = run([*arguments, *given, *(f"callbacks.export_model.{item}" for item in export)])
    return folder, result.run_id, result.folder / "artifacts/models/export_model/E0_U10_S640_best"


def test_torch_and_mlflow_load_the_registered_version(registered):
    folder, run_id, model = registered
    script = f"""
import sys, numpy as np
inputs = np.linspace(0, 1, 192, dtype=np.float32).reshape(3, 1, 8, 8)
outputs = [torch.export.load("{model}/data/model.pt2").module()(torch.from_numpy(inputs)).tolist()]
import mlflow
mlflow.set_tracking_uri("sqlite:///{folder}/mlflow.db")
version = mlflow.MlflowClient().get_model_version_by_alias("digits classifier", "champion")
uri = "models:/digits classifier@champion"
generic = mlflow.pyfunc.load_model(uri)
signature = generic.metadata.signature.to_dict()
outputs += [mlflow.pytorch.load_model(uri)(torch.from_numpy(inputs)).tolist(), generic.predict(inputs).tolist()]
assert "ksuit_runner" not in sys.modules
print(json.dumps([version.version, version.run_id, signature["inputs"], outputs]))
"""
    version, of_run, signature, outputs = elsewhere(folder, script)
    assert (str(version), of_run) == ("1", run_id)
    assert json.loads(signature)[0]["tensor-spec"] == {"dtype": "float32", "shape": [-1, 1, 8, 8]}
    expected = load_model(f"{run_id}@best", output_dir=folder)(torch.linspace(0, 1, 192).reshape(3, 1, 8, 8))
    for found in outputs:
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_mlflow_serves_it(registered):
    folder, run_id, model = registered
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "mlflow", "models", "serve", "-m", str(model), "-p", str(port), "-h", "127.0.0.1", "-w", "1"]
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *command, "--env-manager", "local"],
            cwd=folder, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        )  # fmt: skip
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            (model / "serving_input_example.json").read_bytes(),
            {"Content-Type": "application/json"},
        )
        deadline = time.monotonic() + 90
        while True:
            try:
                found = json.loads(urllib.request.urlopen(request, timeout=30).read())["predictions"]
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    example = torch.tensor(json.loads((model / "input_example.json").read_text()))
    expected = load_model(f"{run_id}@best", output_dir=folder)(example)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


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
