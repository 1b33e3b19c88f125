"""Resume, fork and evaluate by run id, prefix, name or `last`."""

import json
import re
import time
from pathlib import Path

import pytest
from command import SMALL, checkpoint_bytes, journal, mlflow_points, query, run_dir, run_dirs, stop_at
from preloaded import ksuit, start

QUICK = (*SMALL, "tracker=noop", "callbacks=[ema,accuracy]")


@pytest.fixture
def finished(tmp_path):
    ksuit(tmp_path, *QUICK, "name=first")
    return tmp_path


def test_finished_run_says_so_by_whatever_name(finished):
    run_id = run_dir(finished).name
    before = checkpoint_bytes(run_dir(finished)), journal(run_dir(finished))
    for query_ in (run_id, run_id[:6], "first", "last"):
        move_aside(run_dir(finished), "E4_U80_S5120")
        assert "nothing is left to do" in ksuit(finished, f"resume={query_}")
    assert (checkpoint_bytes(run_dir(finished)), journal(run_dir(finished))) == before


def test_longer_training_is_the_run_that_was_longer_from_the_start(tmp_path):
    # With a constant learning rate nothing but the end depends on the length.
    constant = (*QUICK, "schedule=constant", "schedule.warmup=5")
    ksuit(tmp_path / "a", *constant)
    ksuit(tmp_path / "a", "resume=last", "trainer.max_epochs=6")
    ksuit(tmp_path / "b", *constant, "trainer.max_epochs=6")
    name = "E6_U120_S7680/model.safetensors"
    assert checkpoint_bytes(run_dir(tmp_path / "a"))[name] == checkpoint_bytes(run_dir(tmp_path / "b"))[name]
    assert journal(run_dir(tmp_path / "a")) == journal(run_dir(tmp_path / "b"))


def test_refused_resume_leaves_the_status_as_it_was(tmp_path):
    ksuit(tmp_path, *SMALL, "trainer.max_epochs=1", "callbacks=[ema]")
    output = ksuit(tmp_path, "resume=last", "callbacks=[accuracy]", status=2)
    assert "resume_strict=false" in output and "finished" not in output  # which the run is, and not the command
    assert query(tmp_path, "select status from runs") == [("FINISHED",)]
    ksuit(tmp_path, "resume=last", "~callbacks.ema", "resume_strict=false", "trainer.max_epochs=2")
    ksuit(tmp_path, "resume=last", "nonsense", status=2)


def test_callbacks_that_were_allowed_to_differ_hold_for_the_next_resume(tmp_path):
    ksuit(tmp_path, *QUICK, "checkpoint=at_end", "callbacks=[accuracy]")
    arguments = ("callbacks=[accuracy,ema]", "resume_strict=false", "trainer.max_epochs=300")
    stop_at(start(tmp_path, "resume=last", *arguments), tmp_path, update=110)
    ksuit(tmp_path, "resume=last", "trainer.max_epochs=6")
    assert ("accuracy/validation/ema", 120) in journal(run_dir(tmp_path))


def test_other_callbacks_take_nothing_over_from_what_was_said_about_the_former(tmp_path):
    ksuit(tmp_path, *QUICK, "callbacks.ema.decays=[0.9]")
    output = ksuit(tmp_path, "evaluate=last", "callbacks=[accuracy]")
    assert "accuracy/validation" in output and "ema" not in output and "evaluates a dataset" not in output
    assert "none of the callbacks evaluates a dataset. Choose some" in ksuit(
        tmp_path, "evaluate=last", "callbacks=[ema]"
    )


def test_fork_that_cannot_begin_is_explained_and_leaves_no_run(finished):
    output = ksuit(finished, "fork=last", "model=mlp", status=2)
    assert "do not fit" in output and "the run did not begin, and its folder is removed" in output
    assert "callbacks: they are not those" in ksuit(finished, "fork=last", "callbacks=[swa]", status=2)
    assert len(run_dirs(finished)) == 1
    said = ksuit(finished, "resume=last")
    assert "the run is at its end, update 80; a larger trainer.max_epochs continues it" in said


def test_changes_of_a_resume_hold_for_the_next_one(finished):
    process = start(finished, "resume=last", "trainer.max_epochs=60")
    stop_at(process, finished, update=200)
    ksuit(finished, "resume=last")
    assert ("accuracy/validation", 60 * 20) in journal(run_dir(finished))
    launch = json.loads((run_dir(finished) / "artifacts" / "launch.json").read_text())
    assert launch["overrides"][-1] == "trainer.max_epochs=60"
    assert len(launch["resumed_by"]) == 1


def test_what_would_rewrite_the_past_is_refused_with_all_differences_and_the_fork_that_does_it(finished):
    before = journal(run_dir(finished))
    given = ("optimizer.lr=1e-5", "data.batch_size=32", "trainer.max_epochs=9", "seed=1")
    lines = ksuit(finished, "resume=last", *given, status=2).splitlines()
    assert lines[1:4] == ["  seed: 0 -> 1", "  optimizer.lr: 0.003 -> 1e-05", "  data.batch_size: 64 -> 32"]
    assert lines[4].endswith(f"fork={run_dir(finished).name} output_dir={finished} {' '.join(given)}")
    assert "and 4 more" in ksuit(finished, "resume=last", "model=mlp", *given, status=2)
    assert journal(run_dir(finished)) == before


def test_callbacks_may_change_where_it_is_allowed(finished):
    output = ksuit(finished, "resume=last", "callbacks=[accuracy,best_checkpoint]", "trainer.max_epochs=5", status=2)
    assert "ema" in output and "best_checkpoint" in output and "resume_strict=false" in output
    arguments = ("callbacks=[accuracy,best_checkpoint]", "trainer.max_epochs=5", "resume_strict=false")
    said = "resume_strict=false: best_checkpoint starts anew, the state of ema is left out\n"
    assert said in ksuit(finished, "resume=last", *arguments)
    assert "resume_strict" not in ksuit(finished, "resume=last", "trainer.max_epochs=6")
    assert ("accuracy/validation", 100) in journal(run_dir(finished))


def test_evaluation_says_where_its_files_are(finished):
    output = ksuit(finished, "evaluate=last", "callbacks=[predictions]", "callbacks.predictions.images=4")
    artifacts = run_dir(finished) / "artifacts"
    table, image = re.findall(r"^file: (.*)$", output, re.MULTILINE)
    assert table == str(artifacts / "tables" / "eval" / "predictions" / "validation" / "00000080.json")
    assert Path(table).is_file() and Path(image).is_file() and image.endswith(".png")


def test_fork_carries_the_history_and_can_be_resumed(finished):
    parent = run_dir(finished)
    before = checkpoint_bytes(parent), journal(parent)
    ksuit(finished, "fork=first", "optimizer.lr=1e-5", "trainer.max_epochs=6", "name=second")
    child = next(path for path in run_dirs(finished) if path != parent)
    points = journal(child)
    assert before[1].items() <= points.items()
    assert points["learning_rate", 120] < 1e-5
    launch = json.loads((child / "artifacts" / "launch.json").read_text())
    assert (launch["mode"], launch["origin"]) == ("fork", parent.name)
    ksuit(finished, "resume=second", "trainer.max_epochs=7")
    assert ("accuracy/validation", 140) in journal(child)
    assert (checkpoint_bytes(parent), journal(parent)) == before


def test_evaluation_is_recorded_with_the_run_and_leaves_it_as_it_was(tmp_path):
    objective = "objective=accuracy/validation/ema"
    ksuit(tmp_path, *SMALL, "callbacks=[ema,accuracy]", objective, "name=first", "trainer.max_epochs=2")
    before = journal(run_dir(tmp_path)), checkpoint_bytes(run_dir(tmp_path))
    for place in ("first@latest", "first@E1_U20_S1280", "first"):
        output = ksuit(tmp_path, f"evaluate={place}", "callbacks=[accuracy,ema]")
        assert "eval/accuracy/validation" in output and "learning_rate" not in output
    points = journal(run_dir(tmp_path))
    measured = {point: value for point, value in before[0].items() if point[0].startswith("accuracy")}
    added = {(key.removeprefix("eval/"), step): value for (key, step), value in points.items() if key[:5] == "eval/"}
    assert added == measured and len(added) == 4
    assert before[0].items() <= points.items() and checkpoint_bytes(run_dir(tmp_path)) == before[1]
    assert mlflow_points(tmp_path) == points
    assert query(tmp_path, "select name, status from runs") == [("first", "FINISHED")]
    output = ksuit(tmp_path, "evaluate=first", "callbacks=[accuracy]", "data.datasets.validation.split=test")
    assert "eval/accuracy/validation was 0." in output and "stays recorded" in output
    assert journal(run_dir(tmp_path)) == points
    parent = run_dir(tmp_path).name
    ksuit(tmp_path, "fork=first", "trainer.max_epochs=3", "name=second")
    child = next(path.name for path in run_dirs(tmp_path) if path.name != parent)
    tags = dict(query(tmp_path, "select key, value from tags where key like 'ksuit.fork%'"))
    assert tags == {"ksuit.fork_of": parent, f"ksuit.forked_to.{child[:8]}": child}


def move_aside(folder, checkpoint):
    """Leave a checkpoint as a process does that is killed while it replaces it."""
    folder = folder / "artifacts" / "checkpoints"
    (folder / checkpoint).rename(folder / f".{checkpoint}.old")


def test_fork_from_any_checkpoint(finished):
    move_aside(run_dir(finished), "E3_U60_S3840")
    ksuit(finished, "fork=first@E3_U60_S3840", "optimizer.lr=1e-5", "name=second")
    parent, child = sorted(run_dirs(finished), key=lambda path: "fork" in (path / "artifacts/launch.json").read_text())
    ours, theirs = journal(child), journal(parent)
    assert all(ours[point] == value for point, value in theirs.items() if point[1] <= 60)
    assert ours["learning_rate", 70] < 1e-5 < theirs["learning_rate", 70]
    assert "There are: latest, E4_U80_S5120" in ksuit(finished, "fork=first@E9_U9_S9", status=2)
    assert "fork=first@E3_U60_S3840" in ksuit(finished, "resume=first@E3_U60_S3840", status=2)


def test_run_that_is_alive_is_not_resumed_twice(tmp_path):
    process = start(tmp_path, *QUICK, "trainer.max_epochs=2000")
    try:
        while not list(tmp_path.glob("runs/*/metrics.jsonl")) or not list(
            tmp_path.glob("runs/*/artifacts/config.yaml")
        ):
            assert process.poll() is None
            time.sleep(0.05)
        output = ksuit(tmp_path, "resume=last", status=2)
        assert f"pid {process.pid}" in output and "still running" in output
    finally:
        process.kill()
        process.communicate()


def test_failing_run_says_why_and_how_to_resume(tmp_path):
    project = tmp_path / "project"
    (project / "callbacks").mkdir(parents=True)
    (project / "callbacks" / "faulty.py").write_text(
        "from ksuit_runner.callback_base import CallbackBase\n\n\n"
        "class Faulty(CallbackBase):\n"
        "    def _after_update(self, update_counter):\n"
        "        if update_counter.update == 30:\n"
        "            raise RuntimeError('a fault of mine')\n"
    )
    output = ksuit(
        tmp_path / "outputs", *SMALL, "callbacks=[accuracy]", "+callbacks.x._target_=callbacks.faulty.Faulty",
        status=1, cwd=project,
    )  # fmt: skip
    assert "RuntimeError: a fault of mine" in output
    assert output.splitlines()[-1].endswith(f"resume={run_dir(tmp_path / 'outputs').name}")
    assert query(tmp_path / "outputs", "select status from runs") == [("FAILED",)]
    output = ksuit(tmp_path / "outputs", "evaluate=last", "callbacks=[accuracy]", cwd=project)
    assert "status  evaluated after" in output and "failed" not in output
    assert query(tmp_path / "outputs", "select status from runs") == [("FAILED",)]


def test_stopped_early_is_finished(tmp_path):
    arguments = (
        "callbacks=[accuracy,early_stop]",
        "callbacks.early_stop.patience=2",
        "callbacks.early_stop.min_delta=0.9",
    )
    output = ksuit(tmp_path, *SMALL, "tracker=noop", *arguments)
    assert "training stops at update 60" in output
    assert "nothing is left to do: the run was stopped at update 60 by early_stop" in ksuit(tmp_path, "resume=last")
    killed = tmp_path / "killed"
    stop_at(start(killed, *SMALL, "tracker=noop", *arguments), killed, 30)
    ksuit(killed, "resume=last")
    assert journal(run_dir(killed)) == journal(next(path for path in run_dirs(tmp_path)))
