"""``show=``, ``compare=``, ``report=`` and ``list=``: what is stored of runs, on the terminal."""

import json
import re
import signal
import time
from base64 import b64decode
from datetime import datetime, timedelta

import pytest
import yaml
from command import end_by, read_until
from pausing import make_project
from PIL import Image
from preloaded import ksuit, start

from ksuit_runner import run, runs
from ksuit_runner.cli.annotate import annotate
from ksuit_runner.cli.dispatch import _main
from ksuit_runner.cli.list_runs import list_runs
from ksuit_runner.errors import KsuitError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal, last_logged
from ksuit_runner.record.mode import Mode
from ksuit_runner.reports.compare import compare
from ksuit_runner.reports.facts import StoredRun
from ksuit_runner.reports.report import report
from ksuit_runner.reports.show import show
from ksuit_runner.resume.changes import compose_stored
from ksuit_runner.system.recorder_lock import RecorderLock
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.ui.formats import format_duration

FEW = ("model=linear", "trainer.max_epochs=2", "tracker=noop")

TOLD = ("tags=[baseline,paper]", "notes='with few, but good samples'")


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run([f"output_dir={folder}", *FEW, "name=first", "callbacks=[accuracy,best_checkpoint]", *TOLD])
    run([f"output_dir={folder}", *FEW, "name=second", "callbacks=[accuracy,ema]", "optimizer.lr=0.01", "seed=3"])
    return folder


def rows(text):
    """Return the cells of the lines of a text, by the first one."""
    return {cells[0]: cells[1:] for line in text.splitlines() if (cells := line.split())}


def stored_runs(output_dir):
    return [StoredRun(PathProvider(output_dir, folder.name)) for folder in (output_dir / "runs").iterdir()]


def test_a_run_is_shown(output_dir, capsys):
    assert show("second", [f"output_dir={output_dir}"]) == 0
    shown = rows(capsys.readouterr().out)
    stored = StoredRun(PathProvider(output_dir, shown["id"][0]))
    assert shown["status"] == ["finished"] and shown["run"] == ["second"]
    assert shown["optimizer.lr"] == ["0.003", "0.01"] and shown["seed"] == ["0", "3"]
    assert shown["callbacks.loss"] == ["a", "Loss"]
    assert "name" not in shown and "show" not in shown
    last = stored.metrics["accuracy/validation/ema"].last
    assert shown["accuracy/validation/ema"][0] == f"{last:.4g}"
    assert set(shown) >= {"E2_U40_S2560", "E1_U20_S1280"}
    for mode in ("resume", "fork", "evaluate"):
        assert shown[mode][-1] == f"{mode}={stored.paths.run_id}"


def test_what_nobody_has_set_is_no_difference(output_dir):
    assert "accumulation_steps" not in ksuit(output_dir, "show=last")


def test_the_tags_of_checkpoints_are_shown(output_dir, capsys):
    show("first", [f"output_dir={output_dir}"])
    shown = rows(capsys.readouterr().out)
    assert [name for name in ("E2_U40_S2560", "E1_U20_S1280") if shown[name] == ["best"]]


def test_a_run_whose_process_is_gone_was_killed(output_dir, tmp_path):
    folder = next((output_dir / "runs").iterdir())
    box = json.loads((folder / "tracker.json").read_text())
    other = PathProvider(tmp_path, folder.name)
    other.run_dir.mkdir(parents=True)
    other.outbox.write_text(json.dumps({**box, "status": None, "end_time": None}))
    other.journal.symlink_to(folder / "metrics.jsonl")
    assert StoredRun(other).status == "KILLED" and StoredRun(other).took is None, "no file that a run has left"
    other.outbox.write_text("{")
    assert StoredRun(other).status == "DAMAGED" and StoredRun(other).name == other.run_id[:8]


def test_runs_are_compared(output_dir, capsys):
    compare("[first,second]", [f"output_dir={output_dir}"])
    shown = rows(capsys.readouterr().out)
    assert shown["optimizer.lr"] == ["0.003", "0.01"] and shown["callbacks.ema"] == ["an", "Ema"]
    assert "trainer.max_epochs" not in shown and "callbacks.accuracy" not in shown
    assert len(shown["accuracy/validation"]) == 4
    with Image.open(shown["plot"][0]) as picture:
        assert picture.width > 500


DIFF = """# untracked: callbacks/new.py
diff --git a/callbacks/mine.py b/callbacks/mine.py
index 1..2 100644
--- a/callbacks/mine.py
+++ b/callbacks/mine.py
@@ -1,2 +1,2 @@
-rate = 1
+rate = {}
+++counter
"""


def test_the_code_of_runs_is_compared(output_dir, capsys):
    first_and_second = sorted(stored_runs(output_dir), key=lambda run: run.name)
    kept = [(run.paths.environment.read_text(), run.paths.diff, run.diff) for run in first_and_second]
    for number, stored in enumerate(first_and_second):
        known = json.loads(stored.paths.environment.read_text())
        git = {"commit": str(number) * 40, "branch": "main", "dirty": True}
        stored.paths.environment.write_text(json.dumps({**known, "git": git}))
        stored.paths.diff.write_text(DIFF.format(number + 2) if number == 0 else DIFF.format(3).partition("\n")[2])
    compare("[first,second]", [f"output_dir={output_dir}"])
    shown = capsys.readouterr().out
    cells = rows(shown)
    assert cells["commit"] == ["0" * 12, "1" * 12] and "branch" not in cells and "git.commit" not in cells
    assert cells["callbacks/new.py"] == ["untracked"] and f"git diff {'0' * 40} {'1' * 40}" in shown
    lines = [line.split() for line in shown.splitlines() if line.split()[:1] == ["callbacks/mine.py"]]
    assert [line[1:] for line in lines] == [["first", "+rate", "=", "2"], ["second", "+rate", "=", "3"]]
    for environment, path, diff in kept:
        path.with_name("environment.json").write_text(environment)
        path.write_text(diff) if diff else path.unlink()


@pytest.mark.parametrize(
    ("query", "words"),
    [("[first]", "at least two"), ("[first,first]", "given twice"), ("[first,secnd]", "Did you mean 'second'")],
)
def test_runs_that_cannot_be_compared(output_dir, query, words):
    with pytest.raises(KsuitError, match=words):
        compare(query, [f"output_dir={output_dir}"])


def test_commands_may_be_words(output_dir):
    assert rows(ksuit(output_dir, "show", "second"))["run"] == ["second"]
    assert "first" in ksuit(output_dir, "runs") and "first" not in ksuit(output_dir, "runs", "1")
    assert "optimizer.lr" in ksuit(output_dir, "compare", "first", "second")
    assert "a run, such as last, and 2 words" in ksuit(output_dir, "resume", "first", "second", status=2)


def test_the_config_that_a_stored_run_would_get_is_printed(output_dir, capsys):
    assert _main(["--cfg", "job", f"output_dir={output_dir}", "resume=second", "trainer.max_epochs=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_epochs"] == 3 and printed["optimizer"]["lr"] == 0.01
    assert "callbacks" in printed and "resume" not in printed and len(list((output_dir / "runs").iterdir())) == 2
    with pytest.raises(KsuitError, match="this would rewrite the past"):
        _main(["--cfg", "job", f"output_dir={output_dir}", "resume=second", "seed=4"])
    with pytest.raises(KsuitError, match="cannot be given together with --cfg"):
        _main(["--cfg", "hydra", f"output_dir={output_dir}", "resume=second"])


def test_the_list_says_what_was_found_how_long_it_took_and_when(output_dir, capsys):
    assert list_runs("all", [f"output_dir={output_dir}"]) == 0
    listed = rows(capsys.readouterr().out)
    first = next(run for run in stored_runs(output_dir) if run.name == "first")
    name, status, metric, best, *times = listed[first.paths.run_id[:8]]
    assert (name, status, metric) == ("first", "finished", "accuracy/validation")
    assert best == f"{first.metrics['accuracy/validation'].best:.4g}"
    times = times[: times.index("baseline,")]
    assert all(re.fullmatch(r"[\d.]+[hms]", text) for text in times) and len(times) >= 2


@pytest.mark.parametrize("was_killed", [False, True])
def test_the_time_between_an_end_and_a_resume_does_not_count(tmp_path, was_killed):
    run([f"output_dir={tmp_path}", *FEW, "callbacks=[]"])
    (stored,) = stored_runs(tmp_path)
    hour, box = 3_600_000, json.loads(stored.paths.outbox.read_text())
    before = {"start_time": box["start_time"] - 3 * hour, "end_time": box["end_time"] - hour}  # it ran for two hours
    killed = {"status": None, "end_time": None} if was_killed else {}
    stored.paths.outbox.write_text(json.dumps({**box, **before, **killed}))
    stored.paths.journal.unlink()  # a new file, as a copy is: only what it holds says when that was logged
    Journal(stored.paths.journal).append(1, {"loss": 1.0}, before["end_time"])
    for epochs in (3, 4):
        ksuit(tmp_path, "resume=last", f"trainer.max_epochs={epochs}")
    (stored,) = stored_runs(tmp_path)
    assert timedelta(hours=2) < stored.took < timedelta(hours=2, minutes=2) < timedelta(hours=3) < stored.age


def test_a_killed_run_took_the_time_until_it_last_logged_something(tmp_path):
    make_project(tmp_path)
    (tmp_path / "armed").touch()
    outputs = tmp_path / "outputs"
    process = start(outputs, "model=pauses", "model.pauses_at=50", *FEW[1:], "trainer.max_epochs=9", cwd=tmp_path)
    read_until(process, "paused")
    end_by(process, signal.SIGKILL)
    killed = datetime.now()
    (tmp_path / "armed").unlink()
    (seen,) = stored_runs(outputs)
    while seen.recorded_status is None:  # its recorder is noting its end
        time.sleep(0.1)
        (seen,) = stored_runs(outputs)
    box = json.loads(seen.paths.outbox.read_text())
    assert box["status"] == "KILLED" and last_logged(seen.paths.journal) < box["end_time"], "it has seen when that was"
    with RecorderLock(seen.paths.recorder_lock):  # it is gone
        seen.paths.outbox.write_text(json.dumps({**box, "status": None, "end_time": None}))  # nobody has seen the end
    (stored,) = stored_runs(outputs)
    took, size = stored.took, stored.paths.journal.stat().st_size
    assert stored.status == "KILLED" and timedelta(0) < took < killed - stored.started
    listed = rows(ksuit(outputs, "list=all", cwd=tmp_path))[stored.paths.run_id[:8]]
    assert listed[-2] == format_duration(took.total_seconds())
    ksuit(outputs, "evaluate=last", "callbacks=[accuracy]", cwd=tmp_path)
    (evaluated,) = stored_runs(outputs)
    assert size < evaluated.paths.journal.stat().st_size and evaluated.took == took, "an evaluation is no training"


def test_what_is_noted_about_a_run_is_shown_and_changed_while_nobody_trains_it(output_dir, capsys):
    here = f"output_dir={output_dir}"
    row = runs(output_dir).set_index("name").loc["first"]
    assert (row["tags"], row["notes"]) == ("baseline, paper", "with few, but good samples")
    paths = PathProvider(output_dir, show_of(output_dir, "first", capsys)["id"][0])
    assert annotate("first", [here, "tags=[paper]", "notes=other"]) == 0
    with pytest.raises(KsuitError, match="a tag has no comma"):
        annotate("first", [here, "tags=['a,b']"])
    with RunLock(paths.lock), pytest.raises(KsuitError, match="alive|trains|running"):
        annotate("first", [here, "notes=null"])
    shown = show_of(output_dir, "first", capsys)
    assert shown["tags"] == ["paper"] and shown["notes"] == ["other"]
    forked = compose_stored(Mode.FORK, paths, []).config
    assert (forked.tags, forked.notes) == (["paper"], "other"), "a fork inherits what was told last"
    with pytest.raises(KsuitError, match="notes: an evaluation does not change it"):
        compose_stored(Mode.EVALUATE, paths, ["notes=x"])
    list_runs("all", [here])
    listed = rows(capsys.readouterr().out)
    assert listed["run"][-2:] == ["tags", "notes"] and "paper" in listed[paths.run_id[:8]]
    run([here, "resume=first", TOLD[1]])  # as at its start, which is a change by now; the tags stay
    shown = show_of(output_dir, "first", capsys)
    assert shown["tags"] == ["paper"] and shown["notes"] == ["with", "few,", "but", "good", "samples"]
    with pytest.raises(KsuitError, match="say what"):
        annotate("first", [here])


def show_of(output_dir, name, capsys):
    capsys.readouterr()
    show(name, [f"output_dir={output_dir}"])
    return rows(capsys.readouterr().out)


def test_a_report_is_one_page_with_all_that_is_stored(output_dir, tmp_path, capsys):
    stored = next(run for run in stored_runs(output_dir) if run.name == "second")
    figure = stored.paths.artifacts_dir / "figures" / "a<b"
    figure.mkdir(parents=True)
    for step, colour in ((20, "red"), (40, "blue")):
        Image.new("RGB", (2, 2), colour).save(figure / f"{step:08}.png")
    target = tmp_path / "second.html"
    assert report("second", [f"output_dir={output_dir}", f"export_to={target}"]) == 0
    assert str(target) in capsys.readouterr().out
    text = target.read_text()
    cells = set(re.findall("<td>([^<]*)</td>", text))
    assert cells >= {"optimizer.lr", "0.003", "0.01", "E2_U40_S2560", "accuracy/validation/ema", "hardware.cores"}
    assert f"{stored.metrics['accuracy/validation/ema'].last:.4g}" in cells
    assert any(cell.endswith(f"resume={stored.paths.run_id}") for cell in cells)
    pictures = re.findall('src="([^,]*),([^"]*)"', text)
    assert [kind for kind, _ in pictures] == ["data:image/svg+xml;base64", "data:image/png;base64"]
    assert b64decode(pictures[1][1]) == (figure / "00000040.png").read_bytes(), "the newest one is shown"
    assert "a&lt;b, update 40" in text and "<b" not in text.replace("<body", "").replace("<br", "")
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "it refers to another file"
    with pytest.raises(KsuitError, match="has to end in .html"):
        report("second", [f"output_dir={output_dir}", f"export_to={tmp_path / 'second.pdf'}"])
    with pytest.raises(KsuitError, match="there is no folder"):
        report("second", [f"output_dir={output_dir}", f"export_to={tmp_path / 'no' / 'second.html'}"])
