"""Runs of several ranks as users start them: by the command line, torchrun, Python and a launcher of sweeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import checkpoint_bytes, environment, journal, mlflow_points, query, run_dir, run_dirs
from preloaded import ksuit

FATE = """
import os
import signal

from ksuit_runner import CallbackBase


class Fate(CallbackBase):
    '''Does something to a rank after an update, once: RANK.UPDATE.DEED; a deed is the name of a signal, or error.'''

    def __init__(self, deeds, path_provider, **kwargs):
        super().__init__(**kwargs)
        self.deeds, self.folder = deeds, path_provider.run_dir

    def _before_every_update(self, update_counter):
        place = f"{os.environ.get('RANK')}.{update_counter.update}."
        for deed in self.deeds:
            mark = self.folder / f"{deed}.is_done"
            if not deed.startswith(place) or mark.exists():
                continue
            mark.touch()
            if deed == f"{place}error":
                raise ValueError("of fate")
            os.kill(os.getpid(), signal.Signals[deed.removeprefix(place)])
"""
# 20 updates an epoch
RUN = ("model=linear", "trainer.max_epochs=3", "trainer.accumulation_steps=2", "callbacks=[ema,accuracy,fate]")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with the callback ``fate``."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "conf/callbacks").mkdir(parents=True)
    (folder / "callbacks").mkdir()
    (folder / "callbacks/fate.py").write_text(FATE)
    (folder / "conf/callbacks/fate.yaml").write_text("fate:\n  _target_: callbacks.fate.Fate\n  deeds: []\n")
    return folder


def execute(project: Path, *command: str, status: int = 0) -> str:
    """Run Python with some arguments in the project, and return what it has printed."""
    surroundings = environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=surroundings, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def deeds(*found: str) -> str:
    return f"callbacks.fate.deeds=[{','.join(found)}]"


def status_of(output_dir: Path) -> list[tuple]:
    return query(output_dir, "select status from runs")


@pytest.mark.slow
def test_a_run_goes_on_after_a_rank_was_killed_and_ends_as_if_nothing_had_happened(project, tmp_path):
    arguments = ("-m", "ksuit_runner", f"output_dir={tmp_path / 'hit'}", "ranks=2", "strategy=ddp", *RUN)
    fate = deeds("1.30.SIGKILL", "1.50.error")
    output = execute(project, *arguments, fate, status=1)
    again = "rank 1 was killed (SIGKILL): all ranks start again (1 of at most 3 times)"
    assert again in output
    assert output.count("ValueError: of fate") == output.count("Traceback") == 1
    assert "starts from checkpoint E1_U20" in output
    folder = run_dir(tmp_path / "hit")
    assert status_of(tmp_path / "hit") == [("FAILED",)]
    assert again in (folder / "run.log").read_text()
    assert not (tmp_path / "hit/.begun").exists()

    ksuit(tmp_path / "hit", f"resume={folder.name}", "ranks=1", "strategy=single", cwd=project)
    ksuit(tmp_path / "whole", *RUN, cwd=project)
    whole = run_dir(tmp_path / "whole")
    assert journal(folder) == journal(whole)
    assert mlflow_points(tmp_path / "hit") == mlflow_points(tmp_path / "whole")
    hit, undisturbed = checkpoint_bytes(folder), checkpoint_bytes(whole)
    last = [name for name in undisturbed if name.startswith("E3_U60") and name.endswith(".safetensors")]
    assert len(last) > 1
    assert [hit[name] for name in last] == [undisturbed[name] for name in last]
    assert status_of(tmp_path / "hit") == [("FINISHED",)]


@pytest.mark.soak
def test_torchrun_starts_the_same_run_again_unless_a_signal_has_ended_it(project, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "-m", "ksuit_runner")
    fate = deeds("0.30.SIGKILL", "1.50.SIGTERM")
    output = execute(project, *torchrun, f"output_dir={tmp_path}", "strategy=ddp", *RUN, fate)
    assert "starts from checkpoint E1_U20" in output
    folder = run_dir(tmp_path)
    assert status_of(tmp_path) == [("KILLED",)]
    assert max(step for _, step in journal(folder)) == 50
    assert output.count("status  killed") == 1


SCRIPT = """
import sys
from ksuit_runner import run
settings = [f"output_dir={sys.argv[1]}", "ranks=2", "strategy=ddp", *sys.argv[2:], "trainer.max_updates=3"]
result = run(settings)
print("found", result.status, sorted(result.metrics)[0], "torch" in sys.modules)
try:
    run([*settings, "callbacks.fate.deeds=[1.2.error]"])
except ValueError as error:
    print("caught", error, "before_every_update" in str(error.__cause__))
"""


def test_python_code_gets_the_result_and_the_error_of_the_ranks(project, tmp_path):
    (project / "script.py").write_text(SCRIPT)
    output = execute(project, "script.py", str(tmp_path), *RUN)
    assert "found FINISHED accuracy/validation False" in output
    assert "caught of fate True" in output
    assert sorted(status_of(tmp_path)) == [("FAILED",), ("FINISHED",)]


SUBMITIT = pytest.param(("submitit", "launcher.executor=local"), marks=pytest.mark.soak)


@pytest.mark.parametrize("launcher", [("joblib",), SUBMITIT], ids=lambda item: item[0])
def test_a_job_of_a_sweep_has_ranks(launcher, project, tmp_path):
    pytest.importorskip(launcher[0], reason=f"{launcher[0]} is not installed")
    several = ("+launcher.parameters={tasks_per_node: 2}",) if launcher[0] == "submitit" else ()
    words = (
        "-m",
        f"launcher={launcher[0]}",
        *launcher[1:],
        *several,
        "ranks=2",
        "strategy=ddp",
        "trainer.max_updates=2",
    )
    execute(project, "-m", "ksuit_runner", f"output_dir={tmp_path}", *words, *RUN)
    [folder] = run_dirs(tmp_path)
    assert "accuracy/validation" in {key for key, _ in journal(folder)}
    assert status_of(tmp_path) == [("FINISHED",)] * 2


def test_a_mistake_is_reported_once(project, tmp_path):
    settings = (f"output_dir={tmp_path}", "ranks=2", "strategy=ddp", "callbacks=[]")
    output = execute(project, "-m", "ksuit_runner", *settings, "trainer.device=xpu", status=2)
    assert output.count("error:") == 1
    assert "trainer.device: 'xpu' is not available here" in output
    assert not (tmp_path / "runs").exists()
