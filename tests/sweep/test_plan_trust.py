"""A stored plan is data where it is not this user's own; and no password is in it."""

import json
from dataclasses import replace

import pytest

from ksuit_runner.config.targets import Trust
from ksuit_runner.errors import KsuitError
from ksuit_runner.paths import SweepPaths
from ksuit_runner.security.reveal import PASSWORD_VARIABLE
from ksuit_runner.sweep.build_plan import plan_sweep
from ksuit_runner.sweep.commands import _trust_in, _with_password, resume_sweep
from ksuit_runner.sweep.plan import add_job, read_jobs, read_plan, store_plan, stored_texts, update_plan

URI = "http://me:hunter2@127.0.0.1:9"


@pytest.fixture
def paths(tmp_path):
    return SweepPaths(tmp_path, "sweep000")


@pytest.fixture(scope="module")
def planned():
    return plan_sweep(["seed=0,1", "model=linear"], "command")


@pytest.fixture
def plan(paths, planned):
    store_plan(paths, planned.plan, planned.jobs)
    return planned.plan


def change_job(paths, place, value):
    lines = paths.jobs.read_text().splitlines()
    job = json.loads(lines[-1])
    *above, last = place.split(".")
    node = job["config"]
    for key in above:
        node = node[key]
    node[last] = value
    paths.jobs.write_text("\n".join([*lines[:-1], json.dumps(job)]) + "\n")


def test_the_users_own_plan_is_known_until_it_is_touched(paths, plan):
    assert _trust_in(paths, plan, []) is None
    update_plan(paths, plan)
    add_job(paths, replace(read_jobs(paths)[0], index=2))
    assert len(stored_texts(paths)) == 4
    assert _trust_in(paths, plan, []) is None
    change_job(paths, "seed", 7)
    assert _trust_in(paths, plan, []) == Trust((), paths.output_dir)
    assert _trust_in(paths, plan, ["launcher=joblib", "trust=[timm]"]) == Trust(
        ("timm",), paths.output_dir, ("launcher",)
    )


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("data.datasets.test", {"_target_": "psutil.Popen", "args": ["true"]}, r"trust=\[psutil\]"),
        ("loss", {"_target_": "numpy.memmap", "filename": "x", "mode": "w+"}, r"trust=\[numpy\]"),
        ("name", "${oc.env:HOME}", "is not resolved"),
    ],
)
def test_a_job_of_others_that_names_more_is_refused_before_anything_starts(paths, plan, place, value, reason):
    change_job(paths, place, value)
    before = {path: path.read_text() for path in (paths.plan, paths.jobs)}
    with pytest.raises(KsuitError, match=reason):
        resume_sweep(paths, ["resume=sweep000", f"output_dir={paths.output_dir}"])
    assert {path: path.read_text() for path in before} == before
    assert not paths.runs_dir.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fixed": ["name=${oc.env:HOME}"]}, "refer to other config paths"),
        ({"tracker": {"uri": "http://elsewhere"}}, r"tracker\.uri=http://elsewhere"),
        ({"launcher": {"_target_": "psutil.Popen"}}, "psutil|no Launcher"),
        ({"base": {"model": {"_target_": "psutil.Popen"}}}, "."),
    ],
)
def test_a_plan_of_others_that_names_more_is_refused(paths, plan, change, reason):
    stored = json.loads(paths.plan.read_text())
    stored["base"] |= change.get("base", {})
    paths.plan.write_text(json.dumps(stored | {key: value for key, value in change.items() if key != "base"}))
    with pytest.raises(KsuitError, match=reason):
        resume_sweep(paths, ["resume=sweep000", f"output_dir={paths.output_dir}"])


def test_a_password_is_not_stored_and_comes_from_the_environment(paths, monkeypatch):
    planned = plan_sweep(["seed=0,1", "model=linear", f"tracker.uri={URI}"], "command")
    store_plan(paths, planned.plan, planned.jobs)
    assert all("hunter2" not in path.read_text() for path in (paths.plan, paths.jobs, paths.signature))
    plan = read_plan(paths)
    with pytest.raises(KsuitError, match=PASSWORD_VARIABLE):
        _with_password(plan, [])
    monkeypatch.setenv(PASSWORD_VARIABLE, "hunter2")
    plan = _with_password(plan, [])
    assert [plan.with_tracker(job.config)["tracker"]["uri"] for job in read_jobs(paths)] == [URI, URI]
    update_plan(paths, plan)
    assert "hunter2" not in paths.plan.read_text()
