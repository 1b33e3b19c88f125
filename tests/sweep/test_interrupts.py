"""A sweep that ends in the middle: by a second Ctrl-C, or because its launcher breaks."""

import signal

import psutil
import pytest
from command import checkpoint_bytes, interrupt_again, journal, query, read_until, run_dirs
from pausing import make_project
from preloaded import ksuit, start

from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.paths import PathProvider
from ksuit_runner.sweep.commands import start_sweep

SWEEP = (
    *("-m", "model=pauses", "model.pauses_at=50,2000", "trainer.max_epochs=3"),
    *("callbacks=[accuracy]", "objective=accuracy/validation", "data.num_workers=2", "name=mine"),
)
WEIGHTS = "E3_U60_S3840/model.safetensors"


@pytest.mark.slow
def test_a_second_interrupt_ends_a_sweep_at_once_and_it_resumes(tmp_path):
    make_project(tmp_path)
    (tmp_path / "armed").touch()
    outputs = tmp_path / "outputs"
    process = start(outputs, *SWEEP, cwd=tmp_path)
    read_until(process, "paused")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    interrupt_again(process)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=30)[1]
    assert "Traceback" not in output and "job 1/2  killed" in output and "job 2/2" not in output
    (sweep_id,) = (path.name for path in (outputs / "sweeps").iterdir())
    assert query(outputs, f"select status from runs where run_uuid = '{sweep_id}'") == [("KILLED",)]
    assert not list(outputs.glob("*/*/lock.json"))

    (tmp_path / "armed").unlink()
    resumed = ksuit(outputs, f"resume={sweep_id}", cwd=tmp_path)
    assert "job 1/2  finished" in resumed
    assert "starts from checkpoint E" in (run_dirs(outputs)[0] / "run.log").read_text()
    assert set(query(outputs, "select status from runs")) == {("FINISHED",)}
    ksuit(tmp_path / "whole", *SWEEP, "tracker=noop", "data.num_workers=0", cwd=tmp_path)
    for directory, whole in zip(run_dirs(outputs), run_dirs(tmp_path / "whole"), strict=True):
        assert journal(directory) == journal(whole)
        assert checkpoint_bytes(directory)[WEIGHTS] == checkpoint_bytes(whole)[WEIGHTS]


@pytest.mark.parametrize("when", ["open", "submit"])
def test_a_sweep_whose_launcher_breaks_has_not_finished(when, tmp_path, monkeypatch):
    base = "from ksuit_runner.launchers.in_process import InProcessLauncher\n\n\nclass Breaks(InProcessLauncher):\n"
    (tmp_path / "breaks.py").write_text(
        f"{base}    def {when}(self, *given):\n        raise RuntimeError('it breaks')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [
        f"output_dir={tmp_path}",
        "tracker=noop",
        "model=linear",
        "seed=0,1",
        "launcher._target_=breaks.Breaks",
    ]
    with pytest.raises(RuntimeError, match="it breaks"):
        start_sweep(overrides, "command")
    (sweep_id,) = (path.name for path in (tmp_path / "sweeps").iterdir())
    assert Outbox.load(PathProvider(tmp_path, sweep_id)).status == "FAILED"
