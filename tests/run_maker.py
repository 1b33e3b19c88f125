"""Makes small real runs without a config, for the tests of the core; also in processes that they start."""

import random
import shutil
from functools import partial

import numpy as np
import torch
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
from ksuit_runner.paths import PathProvider
from ksuit_runner.schedule import cosine
from ksuit_runner.testing import build_callbacks
from ksuit_runner.trainer.sgd import SgdTrainer


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


def points(run):
    """Return what is in a run's journal, as (key, step, value), in the order in which it was recorded."""
    run.log_writer.write_rest()
    return [(key, step, value) for line, _ in run.log_writer._journal.read() for key, value, step, _ in line]


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
