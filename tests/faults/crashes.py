"""Runs that are killed and resumed until they end, and the comparison with the uninterrupted run."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import forked_recorder
import psutil
from command import checkpoint_bytes, is_recorder, journal, mlflow_points, query, run_dirs
from commit_order import OrderedDisk
from disk import Disk, power_cuts
from fake_environment import FakeEnvironment
from forked_recorder import fork_recorders
from kill_points import AFTER_DEATH, POINTS, RECORDER, TRAINING, choose_writer, strike_at
from preloaded import Command, Preloaded
from watched_calls import Step, join

from ksuit_runner.recorder import life

DATASET = '''
"""Noisy points of three classes, with noise from every generator that an augmentation may use."""

import random

import numpy as np
import torch


class Noisy:
    input_shape, output_shape = (4,), (3,)

    def __init__(self, length):
        generator = torch.Generator().manual_seed(length)
        self.targets = torch.arange(length) % 3
        self.inputs = torch.randn(length, 4, generator=generator) + self.targets.unsqueeze(1)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        noise = torch.rand(4) + np.random.random() + random.random()
        return self.inputs[index] + 0.1 * noise, self.targets[index]


class Net(torch.nn.Module):
    """Has weights that are not row-major, and a buffer that every forward pass reassigns."""

    def __init__(self):
        super().__init__()
        self.expand = torch.nn.Linear(4, 16)
        self.conv = torch.nn.Conv2d(4, 8, 2).to(memory_format=torch.channels_last)
        self.rest = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))
        self.register_buffer("center", torch.zeros(3))

    def forward(self, inputs):
        images = self.expand(inputs).reshape(-1, 4, 2, 2)
        outputs = self.rest(self.conv(images).flatten(1))
        if self.training:
            self.center = 0.9 * self.center + 0.1 * outputs.detach().mean(0)
        return outputs - self.center
'''
CONFIG = """# @package _global_
defaults:
  - override /model: noisy
  - override /data: noisy
trainer:
  max_epochs: 6
  accumulation_steps: 2
checkpoint:
  keep_every: 2
tracker:
  close_timeout_s: 120
callbacks:
  ema:
    decays: [0.9, 0.99]
default_callbacks:
  train_loss:
    every_n_updates: 4
"""
DATA = """
_target_: ksuit_runner.data.container.DataContainer
datasets:
  train: {_target_: noisy.Noisy, length: 100}
  test: {_target_: noisy.Noisy, length: 30}
batch_size: 12
eval_batch_size: 16
drop_last: false
num_workers: 0
"""
ARGUMENTS = ("experiment=noisy", "callbacks=[ema,accuracy,loss,best_checkpoint]", "output_dir=outputs")


POWER = "the power is cut"


class Kill(NamedTuple):
    """One kill: at a point that is reached for the n-th time, or after some time.

    Attributes:
        point: Key of ``POINTS``; ``POWER`` for a power cut during the n-th operation on the disk, which loses what is
            not synced; None for a time. At those in ``AFTER_DEATH``, the process that trains was killed before.
        count: Number n.
        seconds: Time after the start.
        workers: Number of data workers.
        number: Signal for the process that trains, 0 for none; with SIGSTOP it is suspended, and wakes up after another
            one has taken the run over.
        environment: The fake environment of the processes.
        recorder: Signal for the recorder, 0 for none. A suspended one wakes up after another process has taken the run
            over, unless it was killed for that; or is killed by the process that it works for.
    """

    point: str | None
    count: int = 1
    seconds: float = 0.0
    workers: int = 0
    number: int = signal.SIGKILL
    environment: FakeEnvironment = FakeEnvironment()
    recorder: int = 0


@dataclass
class Result:
    """The result of a run: files of its checkpoints, points in the journal and in MLflow, its status."""

    files: dict[str, str]
    points: dict[tuple[str, int], float | None]
    tracked: dict[tuple[str, int], float | None]
    description: set[tuple[str, str]]
    status: str
    position: tuple[int, int, float]

    def differences(self, other: "Result") -> list[str]:
        """Return what differs from the uninterrupted run; additional checkpoints do not count."""
        found = [f"{name} differs" for name, file in other.files.items() if self.files.get(name) != file]
        for name, ours, theirs in (("journal", self.points, other.points), ("MLflow", self.tracked, other.tracked)):
            if wrong := sorted(set(ours.items()) ^ set(theirs.items()), key=str):
                found.append(f"{name}: {len(wrong)} points differ: {wrong[:3]}")
        if wrong := sorted(self.description ^ other.description):
            found.append(f"parameters or datasets: {len(wrong)} differ: {wrong[:3]}")
        if (self.status, self.position) != (other.status, other.position):
            found.append(f"{self.status}, {self.position}, not {other.status}, {other.position}")
        return found


@dataclass
class Project:
    """A folder with a model, a dataset and a config of its own, in which runs are killed."""

    folder: Path
    preloaded: Preloaded
    kills: int = field(default=0, init=False)
    takeovers: int = field(default=0, init=False)
    recorders_hit: int = field(default=0, init=False)
    _started: int = field(default=0, init=False)
    _suspended: list[tuple[Command, str]] = field(default_factory=list, init=False)
    suspended_recorders: list[psutil.Process] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "noisy.py").write_text(DATASET)
        for group, text in {"experiment": CONFIG, "data": DATA, "model": "_target_: noisy.Net\n"}.items():
            (self.folder / "conf" / group).mkdir(parents=True)
            (self.folder / "conf" / group / "noisy.yaml").write_text(text)

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def start(self, *arguments: str, kill: Kill | None = None, disk: Mapping[str, str] | None = None) -> Command:
        kill = kill or Kill(None)
        given = (*(arguments or ARGUMENTS), f"data.num_workers={kill.workers}")
        if arguments:
            given = (*given, "output_dir=outputs")
        self._struck.unlink(missing_ok=True)
        return self._start(given, partial(prepare_process, kill, disk, self._struck))

    def _start(self, arguments: Sequence[str], prepare: Callable[[], None]) -> Command:
        self._started += 1
        return self.preloaded.start(self.folder, self.folder / f"log-{self._started}", arguments, prepare)

    @property
    def _struck(self) -> Path:
        """Says that a kill has come, and what the recorder's id was."""
        return self.folder / "struck"

    def run(self, *arguments: str, workers: int = 0) -> str:
        owner = self._owner()
        command = self.start(*arguments, kill=Kill(None, workers=workers))
        self._wake(command, owner)
        status = command.wait()
        assert status == 0, command.output()
        return command.output()

    def kill(self, kill: Kill, *arguments: str) -> bool:
        """Start or resume a run, and kill it; return whether it was killed before it ended."""
        if kill.point == POWER:
            self._let_recorders_commit()
            return self._cut_power_once(kill, *arguments)
        owner = self._owner()
        command = self.start(*arguments, kill=kill)
        self._wake(command, owner)
        workers = []
        if kill.point is None:
            time.sleep(kill.seconds)
            workers = children(command.pid)
            self._strike(kill, command, workers)
        if kill.number == signal.SIGSTOP and command.is_suspended():
            if self.resume_arguments():
                self._suspended.append((command, kill.environment.host))
                self._count_recorder(kill)
                return False
            command.kill()  # else it would wake up as a second run
        status = command.wait()
        assert status in (0, -signal.SIGKILL), f"{status}: {command.output()}"
        self._count_recorder(kill, was_killed=status != 0)
        if status == 0 or not self.resume_arguments():
            self._continue()
        assert_gone([process for process in workers if process not in self.suspended_recorders])
        was_killed = status != 0 or (kill.recorder == signal.SIGKILL and self._struck.exists())
        self.kills += was_killed
        return was_killed

    def _let_recorders_commit(self) -> None:
        """Wait until nothing is handed over: what the recorder of a suspended command commits is not seen to be synced.

        One that is suspended itself commits nothing.
        """
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline and any(self.outputs.glob("runs/*/artifacts/checkpoints/.E*.ready")):
            time.sleep(0.05)

    def _strike(self, kill: Kill, command: Command, processes: Sequence[psutil.Process]) -> None:
        recorder = next((process for process in processes if is_recorder(process)), None)
        if kill.recorder and recorder is not None and command.is_alive():
            self._struck.write_text(str(recorder.pid))
            with suppress(psutil.NoSuchProcess):
                recorder.send_signal(kill.recorder)
        if kill.number:
            command.send_signal(kill.number)

    def _count_recorder(self, kill: Kill, was_killed: bool = False) -> None:
        """Count a recorder that was killed or suspended, and remember the latter."""
        if not kill.recorder or not self._has_struck(kill, was_killed):
            return
        self.recorders_hit += 1
        if kill.recorder == signal.SIGSTOP:
            with suppress(psutil.NoSuchProcess):
                self.suspended_recorders.append(psutil.Process(int(self._struck.read_text())))

    def _has_struck(self, kill: Kill, was_killed: bool) -> bool:
        """Whether the recorder was struck; one that is to record a death is only after that."""
        deadline = time.monotonic() + 30 * (was_killed and kill.point in AFTER_DEATH)
        while True:
            has_struck = self._struck.exists() and self._struck.read_text() != ""
            if has_struck or time.monotonic() >= deadline:
                return has_struck
            time.sleep(0.02)

    def _cut_power_once(self, kill: Kill, *arguments: str) -> bool:
        owner, remains = self._owner(), self.folder / "remains"
        with power_cuts(self.outputs, remains, [kill.count], is_last=True) as (_, variables):
            command = self.start(*arguments, kill=kill, disk=variables)
            self._wake(command, owner)
            status = command.wait()
        assert status in (0, -signal.SIGKILL), f"{status}: {command.output()}"
        if status != 0:
            self.kills += 1
            shutil.rmtree(self.outputs)
            (remains / str(kill.count)).rename(self.outputs)
        return status != 0

    def _owner(self) -> str:
        """Return what the run's lock says, which a power cut may have left torn."""
        return "".join(path.read_text() for path in self.outputs.glob("runs/*/lock.json"))

    def _wake(self, command: Command, owner: str) -> None:
        """Wake up what is suspended once another process has taken its run over; it has to notice that and end."""
        if not self._suspended and not self.suspended_recorders:
            return
        deadline = time.monotonic() + 60
        while self._owner() == owner and command.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        self.takeovers += len(self._suspended) + len(self.suspended_recorders)
        self._continue()

    def _check_ownership(self, environment: FakeEnvironment) -> None:
        """Check that a suspended process keeps its run on its own host, where it then wakes up and continues."""
        here = [command.pid for command, host in self._suspended if host == environment.host]
        if not here:
            return
        owner = self._owner()
        command = self.start(
            *self.resume_arguments(), kill=Kill(None, environment=environment._replace(has_reader=True))
        )
        status = command.wait()
        if any(f'"pid": {pid},' in owner for pid in here):
            assert status == 2 and "still running" in command.output(), f"{status}: {command.output()}"
        else:  # it had not locked the run yet, or had released it
            assert status == 0, f"{status}: {command.output()}"
        self._continue()

    def abandon(self) -> None:
        """End what is still suspended, after an error."""
        for command, _ in self._suspended:
            command.kill()
            command.wait()
        for recorder in self.suspended_recorders:
            with suppress(psutil.NoSuchProcess):
                recorder.kill()
        self._suspended.clear()
        self.suspended_recorders.clear()

    def _continue(self) -> None:
        for recorder in self.suspended_recorders:
            with suppress(psutil.NoSuchProcess):
                recorder.send_signal(signal.SIGCONT)
        for command, _ in self._suspended:
            command.send_signal(signal.SIGCONT)
        for command, _ in self._suspended:
            status = command.wait()
            assert status in (0, 2), f"it woke up and ended with {status}: {command.output()}"
        assert_gone(self.suspended_recorders)
        self._suspended.clear()
        self.suspended_recorders.clear()

    def resume_arguments(self) -> Sequence[str]:
        """Return the arguments that resume the run; none, for a new run, if it was killed before it had a config."""
        begun = [path for path in self.run_dirs() if (path / "artifacts" / "launch.json").is_file()]
        return (f"resume={begun[-1].name}",) if begun else ()

    def run_dirs(self) -> list[Path]:
        return run_dirs(self.outputs) if (self.outputs / "runs").is_dir() else []

    def result(self) -> Result:
        directory = next(path for path in self.run_dirs() if (path / "artifacts" / "launch.json").is_file())
        newest = max(directory.glob("artifacts/checkpoints/E*"), key=lambda path: int(path.name.split("_")[1][1:]))
        trainer = json.loads((newest / "trainer.json").read_text())["trainer"]
        rate = next(iter(trainer["optimizer"]["groups"].values()))["lr"]
        position = (trainer["counter"]["update"], trainer["counter"]["sample"], rate)
        ((status,),) = query(self.outputs, f"select status from runs where run_uuid = '{directory.name}'")
        changes = "'data.num_workers', 'output_dir'"  # with a resume
        described = (
            f"select key, value from params where key not in ({changes}) union select name, digest from datasets"
        )
        return Result(
            *(checkpoint_bytes(directory), journal(directory), mlflow_points(self.outputs)),
            *(set(query(self.outputs, described)), status, position),
        )

    def clear(self, template: Path | None = None) -> None:
        """Start over, with an empty database if there is a template."""
        shutil.rmtree(self.outputs, ignore_errors=True)
        if template is not None:
            shutil.copytree(template, self.outputs)

    def cut_power(self, target: Path, at: Sequence[int]) -> tuple[OrderedDisk, list[Path]]:
        """Do a whole run, and check the order of its operations on the disk.

        Returns:
            The disk, and what power cuts during its n-th operations would leave.
        """
        with power_cuts(self.outputs, target, at, kind=OrderedDisk) as (disk, variables):
            command = self.start(disk=variables)
            assert command.wait() == 0, command.output()
            assert disk.needed_but_unsynced() == [], disk.needed_but_unsynced()
        assert isinstance(disk, OrderedDisk)
        return disk, sorted(target.iterdir(), key=lambda path: int(path.name))

    def kill_recorder(self, at: Sequence[int]) -> None:
        """Do a whole run, and kill its recorder before the n-th operations of that on the disk."""
        count = itertools.count()

        def kill(step: Step) -> None:
            if step.process == "recorder" and next(count) in at:
                disk.kill("recorder")
                self.kills += 1

        disk = Disk(self.outputs, kill)
        with disk.of_processes() as variables:
            command = self.start(disk=variables)
            assert command.wait() == 0, command.output()

    def survive(self, kills: Sequence[Kill], last_workers: int = 0) -> Result:
        """Kill a run again and again, then let it end."""
        for kill in kills:
            self._check_ownership(kill.environment)
            self.kill(kill, *self.resume_arguments())
        self._check_ownership(FakeEnvironment())
        self.run(*self.resume_arguments(), workers=last_workers)
        return self.result()


def prepare_process(kill: Kill, disk: Mapping[str, str] | None, struck: Path) -> None:
    """Prepare the calling process and its recorders for their kill, unless that comes from outside."""
    kill.environment.enter()
    fork_recorders(partial(_prepare_recorder, kill, disk, struck))
    if disk is not None:
        join(disk, TRAINING)
    if kill.recorder == signal.SIGSTOP:  # sooner than after a minute
        life._PING_S, life._HANGS_S = 0.5, 2.0
    if kill.point in POINTS:
        choose_writer(kill.count)
        if POINTS[kill.point].process == TRAINING:
            strike_at(kill.point, kill.count, lambda: _strike(kill, os.getpid(), forked_recorder.newest_pid, struck))


def _prepare_recorder(kill: Kill, disk: Mapping[str, str] | None, struck: Path, number: int, training: int) -> None:
    if disk is not None:
        join(disk, RECORDER)
    if number or kill.point not in POINTS or POINTS[kill.point].process != RECORDER:
        return
    count = kill.count
    if kill.point in AFTER_DEATH:
        strike_at("after the commit", count, partial(os.kill, training, signal.SIGKILL))
        count = 1
    strike_at(kill.point, count, lambda: _strike(kill, training, os.getpid(), struck))


def _strike(kill: Kill, training: int, recorder: int | None, struck: Path) -> None:
    struck.write_text(str(recorder or 0))
    signals = [(training, kill.number), (recorder, kill.recorder)]
    for pid, number in sorted(signals, key=lambda item: item[0] == os.getpid()):
        if pid and number:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    """Check that the workers of a killed process notice that and end by themselves."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, f"orphans: {alive}"


_SIGNALS = (
    *[(signal.SIGKILL, 0), (signal.SIGSTOP, 0)] * 3,
    *[(0, signal.SIGKILL), (signal.SIGKILL, signal.SIGKILL), (signal.SIGKILL, signal.SIGSTOP)] * 2,
    *[(0, signal.SIGSTOP), (signal.SIGSTOP, signal.SIGKILL), (signal.SIGSTOP, signal.SIGSTOP)],
)
"""Signals for the process that trains and for its recorder, as often as they are drawn."""


def random_kills(seed: int, longest: float) -> list[Kill]:
    """Return two to five kills at random points or times, with random numbers of workers, in random environments."""
    draw = random.Random(seed)
    return [_random_kill(draw, longest) for _ in range(draw.randint(2, 5))]


def _random_kill(draw: random.Random, longest: float) -> Kill:
    point = draw.choice([*POINTS, *[None] * len(POINTS), *[POWER] * (len(POINTS) // 2)])
    count = draw.randrange(250) if point == POWER else draw.randint(1, 9)
    number, recorder = draw.choice(_SIGNALS) if point != POWER else (signal.SIGKILL, 0)
    if point in AFTER_DEATH:
        number, recorder = signal.SIGKILL, draw.choice((signal.SIGKILL, signal.SIGSTOP))
    environment = FakeEnvironment(
        host=draw.choice(("", "", "", "container", "machine")),
        clock_s=draw.choice((0, 0, 0, -3600, -3, 40)),
        has_reader=draw.random() < 0.8,
    )
    return Kill(point, count, draw.uniform(0.0, longest), draw.choice((0, 0, 0, 2)), number, environment, recorder)
