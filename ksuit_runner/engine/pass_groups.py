"""Which evaluations share a pass over their dataset."""

from collections.abc import Sequence
from typing import Any

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.engine.callback_states import overrides


def pass_groups(callbacks: Sequence[PeriodicCallback]) -> dict[CallbackBase, int]:
    """Return the evaluations that may share a pass, each with the number of its group.

    A group evaluates the same batches, and nothing but evaluations is between its members in the config: any other
    callback may write to the model. An evaluation that overrides how it evaluates is by itself, and so is one that
    keeps state in files, of which no snapshot can be taken.
    """
    numbers: dict[Any, int] = {}
    groups: dict[CallbackBase, int] = {}
    between = 0
    for item in callbacks:
        if not isinstance(item, DatasetCallback) or not _may_share(item):
            between += 1
            continue
        key = (between, item.dataset_key, item.batch_size, item.weights_of)
        groups[item] = numbers.setdefault(key, len(numbers))
    return groups


def _may_share(callback: DatasetCallback) -> bool:
    own = ("_periodic_callback", "evaluate", "read_batch")
    is_plain = all(getattr(type(callback), name) is getattr(DatasetCallback, name) for name in own)
    return is_plain and not overrides(callback, "resume_from_checkpoint")
