"""A command that is repeated finds the run that it has begun; another command does not."""

import os

from ksuit_runner.paths import OutputPaths
from ksuit_runner.start.begun_runs import BegunRuns

CONFIG = {"seed": 0, "tracker": {"uri": "https://anna:secret@host"}}


def of(tmp_path, config=CONFIG, **environment):
    return BegunRuns.of_this_process(OutputPaths(tmp_path), config, environment)


def test_a_run_is_found_by_the_same_config_until_it_is_removed(tmp_path):
    begun = BegunRuns(OutputPaths(tmp_path), "id")
    assert begun.find(CONFIG) is None
    begun.add(CONFIG, "run00000")
    assert BegunRuns(OutputPaths(tmp_path), "id").find(dict(reversed(CONFIG.items()))) == "run00000"
    assert BegunRuns(OutputPaths(tmp_path), "other").find(CONFIG) is None
    assert begun.find(CONFIG | {"seed": 1}) is None
    [path] = (tmp_path / ".begun").iterdir()
    assert "secret" not in path.read_text()
    begun.remove()
    begun.remove()
    assert not (tmp_path / ".begun").exists()


def test_what_another_program_has_written_is_not_believed(tmp_path):
    begun = BegunRuns(OutputPaths(tmp_path), "id")
    begun.add(CONFIG, "run00000")
    [path] = (tmp_path / ".begun").iterdir()
    _, digest = path.read_text().split()
    for text in (f"../../elsewhere {digest}", "", f"run00000{digest}", "\0"):
        path.write_text(text)
        assert begun.find(CONFIG) is None
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text(f"run00000 {digest}")
    assert begun.find(CONFIG) is None
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("in the way")
    begun.add(CONFIG, "run00000")
    assert begun.find(CONFIG) is None


def test_what_torchrun_starts_again_has_something_in_common(tmp_path):
    assert of(tmp_path) is of(tmp_path, RANK="0", WORLD_SIZE="2") is None
    local = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    agent = {"TORCHELASTIC_RUN_ID": "none", **local}
    begun = of(tmp_path, **agent, MASTER_PORT="1")
    begun.add(CONFIG, "byagent0")
    assert of(tmp_path, **agent, MASTER_PORT="2", TORCHELASTIC_RESTART_COUNT="1").find(CONFIG) == "byagent0"
    named = of(tmp_path, **(agent | {"TORCHELASTIC_RUN_ID": "none of those"}))
    assert named.find(CONFIG) is None
    named.add(CONFIG, "byname00")
    two_machines = {"TORCHELASTIC_RUN_ID": "none", **(local | {"WORLD_SIZE": "4", "MASTER_PORT": "1"})}
    first = of(tmp_path, **two_machines)
    first.add(CONFIG, "byaddr00")
    assert of(tmp_path, **two_machines).find(CONFIG) is None  # a later job at the same address
    assert of(tmp_path, **two_machines, TORCHELASTIC_RESTART_COUNT="1").find(CONFIG) == "byaddr00"
    assert len(os.listdir(tmp_path / ".begun")) == 3


def test_a_job_that_slurm_has_requeued_finds_the_run_of_the_same_command(tmp_path):
    again = {"SLURM_RESTART_COUNT": "1"}
    of(tmp_path, SLURM_JOB_ID="7").add(CONFIG, "first000")
    other = CONFIG | {"seed": 1}
    of(tmp_path, other, SLURM_JOB_ID="7").add(other, "second00")
    assert of(tmp_path, SLURM_JOB_ID="7").find(CONFIG) is None  # of the same command again in one shell
    assert of(tmp_path, SLURM_JOB_ID="7", **again).find(CONFIG) == "first000"
    assert of(tmp_path, other, SLURM_JOB_ID="7", **again).find(other) == "second00"
    assert of(tmp_path, SLURM_JOB_ID="8", **again).find(CONFIG) is None
    of(tmp_path, SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1").add(CONFIG, "array000")
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", **again}
    assert of(tmp_path, SLURM_JOB_ID="9", **array).find(CONFIG) == "array000"
