"""Callbacks that replace their state: what they have handed out is what an update that fails goes back to."""

import pkgutil
from functools import partial
from importlib import import_module

from torchmetrics.classification import MulticlassF1Score

import callbacks
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.online import RunningCallback
from ksuit_runner.checkpoint.state_types import Packer, copy_state

ARGUMENTS = {
    "OnlineMetrics": {"metrics": {"f1": partial(MulticlassF1Score)}},
    "GradientSpikes": {"warmup": 2, "factor": 1.1},
    "LossSpike": {"window": 2, "threshold": 0.5},
}


def _shipped():
    for module in pkgutil.iter_modules(callbacks.__path__, "callbacks."):
        if module.name.startswith("callbacks.test_"):  # this folder of tests is part of the same namespace
            continue
        for item in vars(import_module(module.name)).values():
            is_callback = isinstance(item, type) and issubclass(item, CallbackBase)
            if is_callback and item.__module__ == module.name and item.replaces_state:
                yield item


def _arguments(kind):
    return ({"per_epoch": True} if issubclass(kind, RunningCallback) else {}) | ARGUMENTS.get(kind.__name__, {})


class Holder(CallbackBase):
    """Holds every state that the others return, and a copy of it."""

    others: dict[str, CallbackBase]

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.held = []

    def _before_every_update(self, update_counter):
        self._hold()

    def _track_after_update_step(self, update_counter):
        self._hold()

    def _hold(self):
        for name, item in self.others.items():
            state = item.state_dict()
            self.held.append((name, state, copy_state(name, state)))


def _packed(state):
    packer = Packer()
    return packer.pack("state", state, ""), {key: value.tolist() for key, value in packer.tensors.items()}


def test_states_that_are_not_copied_never_change(new_run):
    kinds = {kind.__name__: kind for kind in _shipped()}
    assert {"TrainLoss", "OnlineAccuracy", "OutputStatistics", "GradientSpikes", "LossSpike"} <= kinds.keys()
    for parts in (1, 3):
        built = {name: partial(kind, every_n_updates=5, **_arguments(kind)) for name, kind in kinds.items()}
        run = new_run({**built, "holder": Holder}, run_id=f"parts{parts}", accumulation_steps=parts, max_updates=12)
        run["holder"].others = {name: run[name] for name in kinds}
        run.train()
        held = run["holder"].held
        assert len({str(_packed(copied)) for _, _, copied in held}) > 12, "the states do change from update to update"
        assert [name for name, state, copied in held if _packed(state) != _packed(copied)] == []
