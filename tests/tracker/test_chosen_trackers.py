"""Trackers as they are chosen on the command line and in YAML: one, several, of runs and of sweeps."""

import json
from pathlib import Path

import pytest
from command import REPOSITORY, journal

from ksuit_runner import ConfigError, run
from ksuit_runner.cli.sync import sync
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.config.factory import Factory
from ksuit_runner.errors import ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.stored_run import read_config
from ksuit_runner.security.trust import limits
from ksuit_runner.tracker.build import build_tracker
from ksuit_runner.tracker.mlflow import MlflowTracker
from ksuit_runner.tracker.noop import NoopTracker
from ksuit_runner.tracker.several import SeveralTrackers

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'ksuit_runner[tensorboard]'")

from ksuit_runner.tracker.tensorboard import TensorboardTracker

FEW = ("model=linear", "callbacks=[accuracy]", "default_callbacks=none")


def built(tmp_path: Path, *overrides: str):
    config = check_config(compose_config([f"output_dir={tmp_path}", *overrides]))
    return build_tracker(Factory(config), OutputPaths(tmp_path))


@pytest.mark.parametrize("choice", ["tracker=tensorboard", "tracker=[tensorboard]", "tracker=[noop,tensorboard]"])
def test_the_settings_of_a_tracker_have_the_same_names_alone_and_beside_others(tmp_path, choice) -> None:
    tracker = built(tmp_path, choice, "tracker.tensorboard.require=false", "tracker.tensorboard.close_timeout_s=33")
    assert tracker.close_timeout_s == 33 and tracker.require is ("noop" in choice)
    assert isinstance(tracker, SeveralTrackers if "noop" in choice else TensorboardTracker)


def test_mlflow_is_set_up_as_ever_beside_another(tmp_path) -> None:
    for choice in ("tracker=[mlflow,tensorboard]", "tracker=[tensorboard,mlflow]", "+tracker=[tensorboard]"):
        tracker = built(tmp_path, choice, "tracker.uri=http://127.0.0.1:9", "tracker.require=false")
        assert isinstance(tracker, SeveralTrackers) and isinstance(tracker._first, MlflowTracker)
        assert tracker.where().startswith("MLflow, http://127.0.0.1:9\nTensorBoard, see it with:\n  ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracker=[mlflow,tensorbord]"], "Did you mean 'tensorboard'?"),
        (["tracker=tensorboard", "tracker.uri=x"], "tracker.uri"),
        (["tracker=tensorboard", "+tracker.uri=x"], "tracker: it has no _target_"),
        (["tracker=[mlflow,tensorboard]", "+tracker.tensorboard.requir=1"], "Did you mean 'require'?"),
        (
            ["tracker=[mlflow,tensorboard]", "tracker.tensorboard.require=3"],
            "tracker.tensorboard.require: expects true or false",
        ),
        (["+tracker.mine._target_=ksuit_runner.models.linear.Linear"], "tracker.mine._target_: .*BaseTracker"),
        (["+tracker.mine={_target_: 3}"], "tracker.mine._target_"),
        (["+tracker={a/b: {_target_: ksuit_runner.tracker.noop.NoopTracker}}"], "tracker.a/b: a name has letters"),
    ],
)
def test_a_mistake_is_explained(tmp_path, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        built(tmp_path, *overrides)


def test_a_file_without_a_name_is_no_tracker_beside_another(tmp_path, monkeypatch) -> None:
    (tmp_path / "conf" / "tracker").mkdir(parents=True)
    (tmp_path / "conf" / "tracker" / "alone.yaml").write_text("_target_: alone.Alone\n")
    (tmp_path / "alone.py").write_text("from ksuit_runner.tracker.noop import NoopTracker as Alone\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for override in ("+tracker=alone", "tracker=[mlflow,alone]"):
        with pytest.raises(ConfigError, match="^tracker: conf/tracker/alone.yaml .* mlflow .* the line `alone:`, and"):
            built(tmp_path, override)
    with pytest.raises(ConfigError, match="^tracker.uri: there is no such argument"):
        built(tmp_path, "tracker=alone", "+tracker.uri=x")
    built(tmp_path, "tracker=alone")


def test_what_takes_any_settings_may_have_those_of_another(tmp_path, monkeypatch) -> None:
    shipped = (REPOSITORY / "conf" / "tracker" / "mlflow.yaml").read_text()
    own = shipped.replace("ksuit_runner.tracker.mlflow.MlflowTracker", "open_tracker.Open")
    (tmp_path / "conf" / "tracker").mkdir(parents=True)
    (tmp_path / "conf" / "tracker" / "open.yaml").write_text(own)
    source = "from ksuit_runner.tracker.noop import NoopTracker\n\n\nclass Open(NoopTracker):\n"
    source += "    def __init__(self, **settings):\n        super().__init__()\n"
    (tmp_path / "open_tracker.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="^tracker.experimnt: there is no such argument"):
        check_config(compose_config(["tracker=mlflow", "+tracker.experimnt=x"]))
    (tmp_path / "conf" / "tracker" / "again.yaml").write_text(
        shipped.replace("MlflowTracker", "MlflowTracker\nsize: 3")
    )
    with pytest.raises(ConfigError, match="^tracker.size: there is no such argument"):
        check_config(compose_config(["tracker=again"]))
    assert check_config(compose_config(["tracker=open"]))["tracker"]["experiment"] == "ksuit_runner"


def test_the_methods_of_a_tracker_are_called_as_those_that_they_override() -> None:
    class WithDefault(NoopTracker):
        def log_points(self, points, step=0):
            """Nothing."""

    with pytest.raises(TypeError, match="Mine.log_points is called with points, .*: def log_points.self, points.$"):

        class Mine(NoopTracker):
            def log_points(self, points, step):
                """Nothing."""


def tensorboard_points(paths: PathProvider) -> dict[tuple[str, int], float]:
    tracker = TensorboardTracker(paths)
    found = [point for key in tracker.last_steps(paths.run_id) for point in tracker.history(key, paths.run_id)]
    assert len(found) == len({point[::2] for point in found})
    return {(key, step): value for key, value, step, _ in found}


def test_a_run_with_several_trackers_is_resumed_with_its_stored_ones(tmp_path) -> None:
    first = run([f"output_dir={tmp_path}", *FEW, "trainer.max_epochs=1", "tracker=[mlflow,tensorboard]"])
    again = run(
        [
            f"output_dir={tmp_path}",
            f"resume={first.run_id}",
            "trainer.max_epochs=2",
            "tracker.tensorboard.require=false",
        ]
    )
    paths = PathProvider(tmp_path, first.run_id)
    assert again.status == "FINISHED" and read_config(paths).tracker.tensorboard.require is False
    assert tensorboard_points(paths) == journal(paths.run_dir)
    assert MlflowTracker(paths).last_steps(first.run_id) == TensorboardTracker(paths).last_steps(first.run_id)
    stored = json.loads((paths.tensorboard_dir / "run.json").read_text())
    (known,) = MlflowTracker(paths).find(first.run_id)
    assert (stored["name"], stored["status"]) == (known.name, known.status) == (known.name, "FINISHED")
    assert stored["params"]["trainer.max_epochs"] == "1" and stored["tags"]["ksuit.kind"] == "train"


def test_a_tracker_can_be_added_to_a_stored_run_but_not_replaced(tmp_path) -> None:
    first = run([f"output_dir={tmp_path}", *FEW, "trainer.max_epochs=1", "tracker=noop"])
    with pytest.raises(ResumeError, match="rewrite the past"):
        run([f"output_dir={tmp_path}", f"resume={first.run_id}", "trainer.max_epochs=2", "tracker=mlflow"])
    run([f"output_dir={tmp_path}", f"resume={first.run_id}", "trainer.max_epochs=2", "+tracker=tensorboard"])
    paths = PathProvider(tmp_path, first.run_id)
    points = tensorboard_points(paths)
    assert points and min(step for _, step in points) > 20  # from the resume on
    with paths.backlog("tensorboard").open("w") as file:
        file.write('\n{"points": [["late", 1.5, 40, 1700000000000]]}\n')
    changes = [f"output_dir={tmp_path}", "tracker.tensorboard.require=false"]
    assert sync(first.run_id, [f"sync={first.run_id}", *changes]) == 0
    assert tensorboard_points(paths) == {**points, ("late", 40): 1.5}


@pytest.mark.parametrize(("name", "key"), [("wandb", "entity"), ("other", "uri"), ("other", "artifact_root")])
def test_a_stored_config_of_somebody_else_names_no_store_of_a_tracker_beside(tmp_path, name, key) -> None:
    def check(*overrides: str) -> None:
        limits(OutputPaths(tmp_path), {"_target_": "x", name: {"_target_": "y", key: "theirs"}}, overrides)

    with pytest.raises(ConfigError, match=rf"If you trust that: tracker.{name}.{key}=theirs$"):
        check()
    check(f"tracker.{name}.{key}=theirs")


def test_a_sweep_is_recorded_by_several_trackers(tmp_path) -> None:
    overrides = ["-m", f"output_dir={tmp_path}", *FEW, "trainer.max_epochs=1", "seed=0,1"]
    swept = run([*overrides, "tracker=[noop,tensorboard]", "objective=accuracy/validation"])
    assert swept.status == "FINISHED" and len(swept.jobs) == 2
    run([f"resume={swept.run_id}", f"output_dir={tmp_path}", "tracker.tensorboard.require=false"])
    for job in swept.jobs:
        paths = PathProvider(tmp_path, job.run_id)
        stored = json.loads((paths.tensorboard_dir / "run.json").read_text())
        assert (stored["parent_run_id"], stored["status"]) == (swept.run_id, "FINISHED")
        assert tensorboard_points(paths) == journal(paths.run_dir)
    parent = PathProvider(tmp_path, swept.run_id)
    assert json.loads((parent.tensorboard_dir / "run.json").read_text())["tags"]["ksuit.kind"] == "sweep"
