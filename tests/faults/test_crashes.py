"""A run whose processes are killed by SIGKILL at any moment and resumed by its id ends like the uninterrupted run.

The run has dropout, batch norm, a dataset that draws from torch, numpy and random, two accumulation steps, a smaller
last batch, two averages, evaluations, and checkpoints kept by number, by tag and for good. The comparison covers the
bytes of all checkpoints, the points in the journal and in MLflow, status, updates, samples and learning rate.
`make soak` does the same with hundreds of random kills.
"""

import shutil
import signal
from pathlib import Path

import pytest
from crashes import Kill, assert_gone, random_kills
from fake_environment import FakeEnvironment
from kill_points import AFTER_DEATH, POINTS, RECORDER, TRAINING

# The kill comes when a point is reached for the n-th time; by default the first.
COUNTS = {
    **{"fetching data": 30, "after the forward pass": 61, "after the backward pass": 80, "in the optimizer's step": 31},
    **{"after an update": 27, "in an evaluation": 5, "in the middle of a line of the journal": 9},
    **{"after a line of the journal": 12, "taking a snapshot": 3, "writing a file of a checkpoint": 8},
    **{"writing the manifest": 5, "before the hand-over": 4, "before the commit": 4},
    **{"while a tiny checkpoint is unpacked": 10, "before files are synced": 4},  # of a folder made of one file
    **{"between commit and read-back": 4, "between commit and latest": 3},
    **{"between tags and latest": 7, "while a file is replaced": 12, "before old checkpoints are removed": 2},
    **{
        "removing an old checkpoint": 6,
        "after the hand-over": 3,
        "after the commit": 2,
        "before one is dropped": 5,
        **dict.fromkeys(AFTER_DEATH, 3),
    },
}

NO_CONFIG_YET = (
    *("before the run has a folder", "before the run is recorded", "before the folder is followed"),
    *("before the config is stored", "while the config is stored"),
)
"""Points where a kill leaves a run without a config; it cannot be resumed, and a new one starts."""

OF_RECORDER = [point for point, found in POINTS.items() if found.process == RECORDER]


def test_the_comparison_finds_differences(project, reference, template):
    assert len(reference.files) > 10 and len(reference.points) > 60 and len(reference.tracked) > 60
    project.clear(template)
    project.run("experiment=noisy", "callbacks=[ema,accuracy,loss,best_checkpoint]", "seed=1")
    assert project.result().differences(reference)


@pytest.mark.parametrize("point", [point for point in POINTS if point not in OF_RECORDER])
def test_killed_at_a_point(project, reference, template, point):
    check(project, reference, template, Kill(point, COUNTS.get(point, 1)))


@pytest.mark.parametrize("point", [point for point in OF_RECORDER if point not in AFTER_DEATH])
def test_the_recorder_alone_is_killed_at_a_point(project, reference, template, point):
    """The run continues, without a resume."""
    project.clear(template)
    assert project.kill(Kill(point, COUNTS.get(point, 1), number=0, recorder=signal.SIGKILL)), "it was not reached"
    assert project.result().differences(reference) == []


@pytest.mark.parametrize("point", OF_RECORDER)
def test_both_are_killed_at_a_point_of_the_recorder(project, reference, template, point):
    check(project, reference, template, Kill(point, COUNTS.get(point, 1), recorder=signal.SIGKILL))


@pytest.mark.parametrize(
    ("point", "host"),
    [
        ("before files are synced", ""),
        ("between commit and latest", "container"),
        ("before metrics are sent", ""),
        ("before one is dropped", "container"),
        ("before a death is recorded", ""),
    ],
)
def test_a_recorder_that_is_suspended_over_a_resume_changes_nothing_afterwards(
    project, reference, template, point, host
):
    """The process that trains is killed at that moment, so that the resume has to finish what was being recorded."""
    takeovers = project.takeovers
    kill = Kill(point, environment=FakeEnvironment(host), recorder=signal.SIGSTOP)
    check(project, reference, template, kill)
    assert project.takeovers == takeovers + 1


def test_a_suspended_recorder_is_killed_by_a_resume(project, reference, template):
    project.clear(template)
    assert project.kill(Kill("before files are synced", 3, recorder=signal.SIGSTOP))
    (recorder,) = project.suspended_recorders
    command = project.start(*project.resume_arguments())
    assert command.wait() == 0, command.output()
    assert_gone([recorder])
    assert project.result().differences(reference) == []


def check(project, reference, template, kill):
    project.clear(template)
    kills = project.kills
    result = project.survive([kill])
    assert project.kills == kills + 1, "the point was not reached"
    assert result.differences(reference) == []
    assert len(project.run_dirs()) == (2 if kill.point in NO_CONFIG_YET else 1)


@pytest.mark.slow
def test_the_order_on_the_disk_and_a_power_cut_during_an_operation(project, reference, template, tmp_path):
    """What was not synced is lost, as a whole or in parts; `test_disk_order.py` does this at every operation."""
    project.clear(template)
    disk, cuts = project.cut_power(tmp_path, at=range(25, 300, 43))
    assert project.result().differences(reference) == [] and len(cuts) >= 6
    assert {step.process for step in disk.log} == {TRAINING, RECORDER}
    assert len(disk.committed) == 6 and disk.removed
    assert {path: processes for path, processes in disk.writers().items() if len(processes) > 1} == {}
    committing = [step for step in disk.log if step.what == "rename" and Path(step.target).name in disk.committed]
    assert len(committing) == 6 and {step.process for step in committing} == {RECORDER}
    syncing = [step for step in disk.log if step.what == "fsync" and "/checkpoints" in step.path]
    assert {step.process for step in syncing} == {RECORDER}, "training waits for no disk"
    for cut in cuts:
        project.clear()
        shutil.copytree(cut, project.outputs)
        project.run(*project.resume_arguments())
        assert project.result().differences(reference) == [], cut.name


def test_the_recorder_is_killed_at_operations_on_the_disk(project, reference, template):
    project.clear(template)
    kills = project.kills
    project.kill_recorder(at=(5, 17, 33))
    assert project.kills == kills + 3
    assert project.result().differences(reference) == []


@pytest.mark.parametrize("seed", range(3))
def test_killed_several_times_at_random_with_other_numbers_of_workers(project, reference, template, seed):
    project.clear(template)
    result = project.survive(random_kills(seed, longest=3.0), last_workers=2 * (seed % 2))
    assert result.differences(reference) == []


RATE = '''
"""Logs the learning rate of an update."""

from ksuit_runner.callback_base import CallbackBase


class Rate(CallbackBase):
    def _before_every_backward(self, update_counter, losses):
        (self.rate,) = set(self.trainer.learning_rates().values())

    def _after_update(self, update_counter):
        self.writer.add_scalar("rate", self.rate)
'''


def test_an_extended_run_follows_the_longer_curve_from_its_first_new_update(project, template):
    (project.folder / "callbacks").mkdir(exist_ok=True)
    (project.folder / "callbacks" / "rate.py").write_text(RATE)
    rate = ("experiment=noisy", "callbacks=[ema]", "+callbacks.rate._target_=callbacks.rate.Rate", "schedule=linear")
    project.clear(template)
    project.run(*rate, "schedule.warmup=0", "schedule.end_factor=0", "optimizer.lr=1")
    project.run("resume=last", "trainer.max_epochs=12")
    points = project.result().points
    rates = [points["rate", step] for step in range(1, 109)]
    assert rates == pytest.approx([1 - update / (53 if update < 54 else 107) for update in range(108)])
