"""The plan of a sweep from another machine: which one is brought, and what is refused."""

import shutil

import pytest
from servers import free_port

from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.errors import ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider, SweepPaths
from ksuit_runner.sweep.build_plan import plan_sweep
from ksuit_runner.sweep.commands import show_leaderboard
from ksuit_runner.sweep.fetch_sweep import fetch_plan, fetch_runs
from ksuit_runner.sweep.job_runs import JobRecord
from ksuit_runner.sweep.plan import Job, SweepPlan, read_jobs, read_plan, store_plan
from ksuit_runner.sweep.stored_sweep import find_sweep
from ksuit_runner.sweep.sweep_settings import SweepSettings
from ksuit_runner.tracker.base import KIND_TAG, RunInfo
from ksuit_runner.tracker.noop import NoopTracker

ID, OTHER = "a" * 32, "b" * 32


class Store(NoopTracker):
    """Keeps the artifacts of runs in a folder."""

    artifacts_are_local = False

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.infos = []

    def add(self, run_id=ID, kind="sweep", name="mine", tags=None):
        (self.folder / run_id).mkdir(parents=True)
        self.infos.append(RunInfo(run_id, name, tags={KIND_TAG: kind, **(tags or {})}))
        return self.folder / run_id

    def add_plan(self, run_id=ID, method="grid", base=None, config=None, **tags):
        folder, made = self.add(run_id, tags=tags), SweepPaths(self.folder / "made", run_id)
        settings = SweepSettings(method=method, samples=None if method == "grid" else 3)
        plan = SweepPlan("mine", "command", [], settings, {"_target_": "a.B"}, base or {}, "accuracy/test", job_count=1)
        store_plan(made, plan, [Job(0, {"seed": "0"}, config or {"seed": 0})])
        for path in (made.plan, made.jobs):
            shutil.copy(path, folder)
        return folder

    def find(self, query):
        return [info for info in self.infos if info.run_id.startswith(query) or info.name == query]

    def list_artifacts(self, path="", run_id=None):
        return [found.name for found in (self.folder / run_id).iterdir()]

    def download(self, artifact_path, destination, run_id=None):
        destination.mkdir(parents=True, exist_ok=True)
        return shutil.copy(self.folder / run_id / artifact_path, destination)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def outputs(tmp_path):
    return OutputPaths(tmp_path / "outputs")


@pytest.mark.parametrize("query", [ID, ID[:6], "mine"])
def test_a_plan_is_brought_with_its_jobs(store, outputs, query):
    store.add_plan()
    paths = fetch_plan(store, outputs, query)
    assert paths.sweep_id == ID
    assert read_plan(paths).name == "mine" and [job.config for job in read_jobs(paths)] == [{"seed": 0}]
    assert [path.name for path in outputs.output_dir.iterdir()] == ["sweeps"]


def test_a_sweep_that_began_without_the_server_has_its_own_id_here(store, outputs):
    store.add_plan(**{"ksuit.run_id": OTHER})
    assert fetch_plan(store, outputs, ID).sweep_id == OTHER


def test_what_is_no_sweep_is_left_to_others(store, outputs):
    store.add(kind="train")
    assert fetch_plan(store, outputs, ID) is None
    assert not outputs.output_dir.exists()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda store: [store.add_plan(), store.add_plan(OTHER)],
            f"'mine' matches 2 sweeps; give an id. The newest is {ID}",
        ),
        (lambda store: store.add(), "its plan is not in the tracker; it can be resumed only where it was started"),
        (lambda store: store.add_plan(method="tpe"), "a search can be resumed only where it was started"),
        (lambda store: store.add_plan(base={"tracker": {"uri": "${oc.env:HOME}"}}), "cannot be used"),
        (lambda store: store.add_plan(config={"${oc.env:HOME}": 1}), "cannot be used"),
        (lambda store: (store.add_plan() / "plan.json").write_text("{}"), "cannot be used"),
        (lambda store: (store.add_plan() / "plan.json").write_text('{"name": '), "cannot be used"),
        (lambda store: (store.add_plan() / "jobs.jsonl").write_text('{"index": 0}'), "cannot be used"),
        (lambda store: store.add("../away"), "is not a run id"),
    ],
)
def test_what_cannot_be_resumed_here_is_refused_in_a_line(store, outputs, make, reason):
    make(store)
    with pytest.raises(ResumeError) as raised:
        fetch_plan(store, outputs, "mine")
    assert reason in str(raised.value) and "\n" not in str(raised.value)
    assert not outputs.sweeps_dir.exists()


def test_runs_that_are_here_or_have_finished_or_stored_nothing_are_not_brought(store, outputs):
    paths = SweepPaths(outputs.output_dir, ID)
    tracker = RecordedTracker(store, outputs)
    tracker.resume_run(ID)
    Recording(store, PathProvider(outputs.output_dir, ID)).reach()
    store.add("c" * 32, "train")
    PathProvider(outputs.output_dir, "here").run_dir.mkdir(parents=True)
    records = {
        0: JobRecord("finished", "FINISHED", "", "finished"),
        1: JobRecord("here", "KILLED", "", "here"),
        2: JobRecord("c" * 32, "RUNNING", "", "c" * 32),
    }
    fetch_runs(tracker, paths, records)
    assert {path.name for path in outputs.runs_dir.iterdir()} == {ID, "here"}


def test_a_server_that_is_away_is_not_asked_about_a_run_that_is_here(outputs):
    PathProvider(outputs.output_dir, ID).run_dir.mkdir(parents=True)
    overrides = [f"output_dir={outputs.output_dir}", f"tracker.uri=http://127.0.0.1:{free_port()}", f"resume={ID}"]
    assert find_sweep(ID[:8], overrides) is None


def test_a_sweep_that_no_server_knows_yet_is_shown(tmp_path, capsys):
    overrides = [f"output_dir={tmp_path}", f"tracker.uri=http://127.0.0.1:{free_port()}"]
    planned, paths = plan_sweep([*overrides, "seed=0,1"], "command"), SweepPaths(tmp_path, ID)
    store_plan(paths, planned.plan, planned.jobs)
    Outbox(paths.sweep_id, "sweep").store(PathProvider(tmp_path, paths.sweep_id))
    assert show_leaderboard(paths.sweep_id[:8], overrides) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [["1", "0", "missing"], ["2", "1", "missing"]]
