"""A rehearsal of evaluations: what is wrong with one of them ends a run before its first update."""

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback, FurtherDataset
from ksuit_runner.models.kept_buffers import notes_of
from ksuit_runner.trainer.evaluation_pass import read_first_batch
from ksuit_runner.trainer.sgd import SgdTrainer


def rehearse(evaluations: Iterable[DatasetCallback], trainer: SgdTrainer, models: Mapping[str, nn.Module]) -> None:
    """Let evaluations read the first batch of their datasets, and forget what they find in it.

    They are evaluations with ``shares_work``, which leave nothing behind, as all that they find is in ``gathered``.
    What the forward pass may have changed in the model or the trainer is restored; so are numbers, flags and texts in
    which modules note what is in their buffers.

    Args:
        evaluations: The callbacks, whose hooks before training were called.
        trainer: Trainer of the run.
        models: Models to evaluate by the name of their weights.

    Raises:
        ConfigError: An evaluation does not fit the model or the data.
        Exception: What else a dataset, the model or a callback raised.
    """
    by_batch: dict[Any, list[FurtherDataset]] = {}
    for item in evaluations:
        for reader in item.readers:
            key = reader.dataset_key, reader.batch_size
            by_batch.setdefault(key, []).append(FurtherDataset(item, reader.dataset_key))
    if not by_batch:
        return
    trainer.update.take_snapshot()
    modules = [item for root in (trainer.model.module, trainer.loss) for item in root.modules()]
    notes = [(vars(item), set(vars(item)), notes_of(item)) for item in modules]
    try:
        with torch.no_grad(), _eager():
            for readers in by_batch.values():
                for error in read_first_batch(readers, trainer, models).values():
                    raise error
    finally:
        trainer.update.roll_back()
        for module, (values, names, before) in zip(modules, notes, strict=True):
            for name in notes_of(module).keys() - names:
                del values[name]
            values.update(before)


def _eager() -> AbstractContextManager[Any]:
    """Return a context without compilation, whose code would depend on which batch comes first."""
    if "torch._dynamo" in sys.modules:
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()
