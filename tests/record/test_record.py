"""What is stored about a run, in MLflow and in its folder."""

import json

import pytest
import yaml
from command import query, run_dir
from preloaded import ksuit

from ksuit_runner.cli.annotate import annotate


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("record")
    (path / "printed.txt").write_text(ksuit(path, "name=recorded", "seed=3", "notes=first"))
    return path


def test_default_run_learns_digits_with_live_and_averaged_weights(output_dir):
    best = dict(query(output_dir, "select key, max(value) from metrics group by key"))
    assert best["accuracy/validation"] >= 0.96
    assert best["accuracy/validation ema"] >= 0.96


def test_mlflow_has_parameters_inputs_tags_and_status(output_dir):
    assert query(output_dir, "select name, status from runs") == [("recorded", "FINISHED")]
    params = dict(query(output_dir, "select key, value from params"))
    assert params["optimizer.lr"] == "0.003"
    assert params["callbacks.ema.decays"] == "[0.99]"
    assert params["parameter_count"] == "94186"
    datasets = dict(query(output_dir, "select name, dataset_profile from datasets"))
    assert datasets.keys() == {"digits/train", "digits/validation", "digits/test"}
    assert json.loads(datasets["digits/train"])["num_rows"] == 1295
    tags = dict(query(output_dir, "select key, value from tags"))
    assert "seed=3" in tags["ksuit.command"] and tags["ksuit.command"] in tags["mlflow.note.content"]
    assert tags["mlflow.source.name"] == "ksuit_runner" and tags["mlflow.user"]
    assert tags["ksuit.notes"] == "first" and tags["mlflow.note.content"].startswith("first\n\n```")
    annotate("recorded", [f"output_dir={output_dir}", "notes=later", "tags=[paper]"])
    later = dict(query(output_dir, "select key, value from tags"))
    told = {"ksuit.notes": "later", "ksuit.tags": "paper"}
    told["mlflow.note.content"] = tags["mlflow.note.content"].replace("first", "later", 1)
    assert {**tags, **told} == later and query(output_dir, "select status from runs") == [("FINISHED",)]
    kinds = query(output_dir, "select value from experiment_tags where key = 'mlflow.experimentKind'")
    assert kinds == [("custom_model_development",)], "MLflow's page shows training runs"


def test_folder_has_config_command_environment_and_the_artifacts_of_mlflow(output_dir):
    artifacts = run_dir(output_dir) / "artifacts"
    assert query(output_dir, "select artifact_uri from runs") == [(str(artifacts),)]
    config = yaml.safe_load((artifacts / "config.yaml").read_text())
    assert config["seed"] == 3
    assert "${" not in (artifacts / "config.yaml").read_text()
    launch = json.loads((artifacts / "launch.json").read_text())
    assert launch["overrides"] == [f"output_dir={output_dir}", "name=recorded", "seed=3", "notes=first"]
    environment = json.loads((artifacts / "environment.json").read_text())
    assert environment["versions"]["torch"]
    latest = (artifacts / "checkpoints" / "latest").read_text().strip()
    assert (artifacts / "checkpoints" / latest / "model.safetensors").is_file()
    tags = json.loads((artifacts / "checkpoints" / "tags.json").read_text())
    assert (artifacts / "checkpoints" / tags["best"]).is_dir()


def test_person_sees_id_folder_metrics_and_how_to_resume(output_dir):
    lines = (output_dir / "printed.txt").read_text().splitlines()
    run_id = run_dir(output_dir).name
    assert any(run_id in line for line in lines[:3])
    assert any(line.startswith("accuracy/validation/ema") and "↑" in line for line in lines)
    assert any(line.startswith("loss/validation ") and "↓" in line for line in lines)
    assert lines[-1].endswith(f"python -m ksuit_runner output_dir={output_dir} resume={run_id}")
    assert not any("\x1b" in line for line in lines)
    assert "update 400/400" in (run_dir(output_dir) / "run.log").read_text()
