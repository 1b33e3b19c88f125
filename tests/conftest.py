"""Small real runs without a config, for the tests of the core."""

import random
import shutil
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from command import end_started
from hypothesis import HealthCheck, settings
from torch import nn

from ksuit_runner.checkpoint.folders import names
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import Progress
from ksuit_runner.data.container import DataContainer
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.engine.assembly import build_run
from ksuit_runner.keyed_random import keyed
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.schedule import cosine
from ksuit_runner.security.authorship import KEY_VARIABLE
from ksuit_runner.system.signals import SIGNALS
from ksuit_runner.testing import build_callbacks
from ksuit_runner.tracker.mlflow import MlflowTracker
from ksuit_runner.trainer.sgd import SgdTrainer

# Tests must not fail because the machine is busy.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# What is started by nohup or in the background of a script ignores these, and so would every run of the tests.
for number in SIGNALS:
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Run files with slow tests first: one that is begun last leaves all workers but one idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


class Augmented:
    """Points of three classes in four dimensions, with noise from every generator that an augmentation may use."""

    def __init__(self, length):
        generator = torch.Generator().manual_seed(length)
        self.targets = torch.arange(length) % 3
        self.inputs = torch.randn(length, 4, generator=generator) + self.targets.unsqueeze(1)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        noise = torch.rand(4) + np.random.random() + random.random()
        return self.inputs[index] + 0.1 * noise, self.targets[index]


class Maker:
    """Makes trainers and runs in one folder; ``close`` ends their threads and workers."""

    def __init__(self, folder):
        self.folder = folder
        self.runs = []

    def paths(self, run_id="run00000"):
        return PathProvider(self.folder, run_id)

    def trainer(
        self,
        batch_size=6,
        drop_last=True,
        num_workers=0,
        dropout=0.5,
        model=None,
        trainer_class=SgdTrainer,
        world=None,
        **kwargs,
    ):
        datasets = {"train": Augmented(20), "test": Augmented(7)}
        data = DataContainer(datasets, batch_size, seed=3, drop_last=drop_last, num_workers=num_workers, world=world)
        with keyed(3, "model"):
            model = model or nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Linear(8, 3))
        defaults = {
            "optimizer": partial(torch.optim.AdamW, lr=1e-2),
            "schedule": partial(cosine, warmup=2),
            "loss": nn.CrossEntropyLoss(),
            "strategy": Strategy(world),
        }
        if not kwargs.keys() & {"max_epochs", "max_updates", "max_samples"}:
            kwargs["max_updates"] = 8
        return trainer_class(ModelBase(model), data, **{**defaults, **kwargs})

    def run(self, callbacks=None, run_id="run00000", checkpoint=None, resume=False, strict=True, **kwargs):
        """Build a run, with ``callbacks`` as {name: (class, arguments)}."""
        paths, trainer = self.paths(run_id), self.trainer(**kwargs)
        makers = {name: partial(cls, **given) for name, (cls, given) in (callbacks or {}).items()}
        run = build_run(
            trainer,
            paths,
            partial(build_callbacks, makers, seed=3),
            seed=3,
            checkpoint_writer=CheckpointWriter(paths, **(checkpoint or {})),
            checkpoint=read_newest(paths) if resume else None,
            strict=strict,
        )
        self.runs.append(run)
        return run

    def resumed(self, *args, update, run_id="run00000", **kwargs):
        """Build a run that resumes from its checkpoint at an update, as if it had been killed there."""
        folder, copy = (self.paths(name) for name in (run_id, f"{run_id}-resumed"))
        shutil.copytree(folder.run_dir, copy.run_dir)
        for name in names(copy):
            if Progress.parse(name).update > update:
                shutil.rmtree(copy.checkpoints_dir / name)
        return self.run(*args, run_id=copy.run_id, resume=True, **kwargs)

    def close(self):
        for run in self.runs:
            run.checkpoint_writer.close()
            run.data.close()


@pytest.fixture
def maker(tmp_path):
    maker = Maker(tmp_path)
    yield maker
    maker.close()


def _plain(tree):
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.cpu().contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return tree


@pytest.fixture
def bits():
    """Convert a tree of tensors to plain values that are equal only if every bit is."""
    return _plain


@pytest.fixture(autouse=True, scope="session")
def _key(tmp_path_factory):
    """Sign configs with a key of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, str(tmp_path_factory.mktemp("state") / "key"))
        yield


@pytest.fixture(autouse=True)
def _processes():
    """End the processes of a failed test, so that they do not make the next one fail."""
    yield
    end_started()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with an empty store: creating one takes a second, copying it a millisecond."""
    folder = tmp_path_factory.mktemp("template")
    MlflowTracker(OutputPaths(folder))._experiment_id()
    return folder


@pytest.fixture
def paths(template: Path, tmp_path: Path) -> OutputPaths:
    shutil.copytree(template, tmp_path / "outputs")
    return OutputPaths(tmp_path / "outputs")
