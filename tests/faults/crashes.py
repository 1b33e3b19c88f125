"""Runs that are killed and resumed until they end, and the comparison with the run that was never killed."""

import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from command import checkpoint_bytes, journal, mlflow_points, query, run_dirs
from disk import cut_power
from kill_points import POINTS, preparation
from preloaded import Command, Preloaded

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


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            *(torch.nn.Linear(4, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 3))
        )
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


class Kill(NamedTuple):
    """One kill: at a place that is reached for the n-th time, or after some time; with that many data workers."""

    place: str | None
    count: int = 1
    seconds: float = 0.0
    workers: int = 0
    number: int = signal.SIGKILL


@dataclass
class Result:
    """What a run has left: files of its checkpoints, points in the journal and in MLflow, its status."""

    files: dict[str, str]
    points: dict[tuple[str, int], float | None]
    tracked: dict[tuple[str, int], float | None]
    status: str
    position: tuple[int, int, float]

    def differences(self, other: "Result") -> list[str]:
        """Say what differs from the run that was never killed; a checkpoint more, of a kill's moment, is none."""
        found = [f"{name} differs" for name, file in other.files.items() if self.files.get(name) != file]
        for name, ours, theirs in (("journal", self.points, other.points), ("MLflow", self.tracked, other.tracked)):
            if wrong := sorted(set(ours.items()) ^ set(theirs.items()), key=str):
                found.append(f"{name}: {len(wrong)} points differ: {wrong[:3]}")
        if (self.status, self.position) != (other.status, other.position):
            found.append(f"{self.status}, {self.position}, not {other.status}, {other.position}")
        return found


@dataclass
class Project:
    """A folder with a model, a dataset and a config of its own, in which runs are killed."""

    folder: Path
    preloaded: Preloaded
    kills: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "noisy.py").write_text(DATASET)
        for group, text in {"experiment": CONFIG, "data": DATA, "model": "_target_: noisy.Net\n"}.items():
            (self.folder / "conf" / group).mkdir(parents=True)
            (self.folder / "conf" / group / "noisy.yaml").write_text(text)

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def start(self, *arguments: str, kill: Kill | None = None) -> Command:
        prepare = preparation(kill.place, kill.count, kill.number) if kill and kill.place else None
        workers = f"data.num_workers={kill.workers if kill else 0}"
        given = (*(arguments or ARGUMENTS), workers)
        if arguments:
            given = (*given, "output_dir=outputs")
        return self.preloaded.start(self.folder, self.folder / "log", given, prepare)

    def run(self, *arguments: str, workers: int = 0) -> str:
        command = self.start(*arguments, kill=Kill(None, workers=workers))
        status = command.wait()
        assert status == 0, command.output()
        return command.output()

    def kill(self, kill: Kill, *arguments: str) -> bool:
        """Start a run, or go on with it, and kill it; return whether it was killed before it ended."""
        command = self.start(*arguments, kill=kill)
        if kill.place is None:
            time.sleep(kill.seconds)
            workers = children(command.pid)
            command.kill()
        else:
            workers = []
        status = command.wait()
        assert status in (0, -signal.SIGKILL), command.output()
        assert_gone(workers)
        self.kills += status != 0
        return status != 0

    def go_on(self) -> Sequence[str]:
        """Return the arguments that go on: from the beginning if the run was killed before it had a config."""
        begun = [path for path in self.run_dirs() if (path / "artifacts" / "launch.json").is_file()]
        return (f"resume={begun[-1].name}",) if begun else ()

    def run_dirs(self) -> list[Path]:
        return run_dirs(self.outputs) if (self.outputs / "runs").is_dir() else []

    def result(self) -> Result:
        directory = next(path for path in self.run_dirs() if (path / "artifacts" / "launch.json").is_file())
        newest = max(directory.glob("artifacts/checkpoints/E*"), key=lambda path: int(path.name.split("_")[1][1:]))
        trainer = torch.load(newest / "trainer.pt", weights_only=True)["trainer"]
        position = (trainer["counter"]["update"], trainer["counter"]["sample"], trainer["schedule"]["_last_lr"][0])
        ((status,),) = query(self.outputs, f"select status from runs where run_uuid = '{directory.name}'")
        return Result(checkpoint_bytes(directory), journal(directory), mlflow_points(self.outputs), status, position)

    def clear(self, template: Path | None = None) -> None:
        """Begin anew, with an empty database that was made before."""
        shutil.rmtree(self.outputs, ignore_errors=True)
        if template is not None:
            shutil.copytree(template, self.outputs)

    def cut_power(self, target: Path, at: Sequence[int]) -> list[Path]:
        """Do a whole run, and return what power cuts during its n-th operations on the disk would have left."""
        arguments = (*ARGUMENTS, "data.num_workers=0")
        prepare = partial(cut_power, self.outputs, target, at)
        command = self.preloaded.start(self.folder, self.folder / "log", arguments, prepare)
        assert command.wait() == 0, command.output()
        return sorted(target.iterdir(), key=lambda path: int(path.name))

    def survive(self, kills: Sequence[Kill], last_workers: int = 0) -> Result:
        """Kill a run again and again, then let it end."""
        arguments: Sequence[str] = ()
        for kill in kills:
            self.kill(kill, *arguments)
            arguments = self.go_on()
        self.run(*arguments, workers=last_workers)
        return self.result()


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    """See that the workers of a killed process notice it and end by themselves."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, f"orphans: {alive}"


def random_kills(seed: int, longest: float) -> list[Kill]:
    """Return one to four kills, at random places or times, with random numbers of workers."""
    draw = random.Random(seed)
    places = [*POINTS, *[None] * len(POINTS)]
    return [
        Kill(draw.choice(places), draw.randint(1, 9), draw.uniform(0.0, longest), draw.choice((0, 0, 0, 2)))
        for _ in range(draw.randint(1, 4))
    ]
