"""Parameters that are to be trained from some update on: what thaws joins, what is replaced is not lost silently."""

import pytest
import torch
from torch import nn

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import KsuitError


def frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return model


class Thaw(CallbackBase):
    """Lets the first layer learn after an epoch, and after a resume whatever had thawed by then."""

    def _before_training(self, update_counter):
        self.model.module[0].requires_grad_(update_counter.epoch >= 1)

    def _after_epoch(self, update_counter):
        self.model.module[0].requires_grad_(True)


RULES = {"slow": {"match": ["0.*"], "lr_factor": 0.1}}


@pytest.mark.parametrize("stop", [2, 3, 4])  # before, at and after the end of the first epoch
def test_what_thaws_is_trained_under_its_rules_and_exactly_so_over_a_resume(maker, bits, stop):
    options = {"parameter_rules": RULES, "checkpoint": {"every_n_updates": 1, "keep_last": 9}}
    whole = maker.run({"thaw": (Thaw, {})}, run_id="whole", model=frozen(), max_updates=6, **options)
    train(whole)
    for run_id, updates, resume in (("cut", stop, False), ("cut", 6, True)):
        run = maker.run({"thaw": (Thaw, {})}, run_id=run_id, model=frozen(), max_updates=6, resume=resume, **options)
        run.counter.end_update = updates
        train(run)
    begun, early, ended = frozen().state_dict(), maker.paths("whole").at_checkpoint("E1_U3_S18"), whole.trainer.model
    assert (read_newest(early, "E1_U3_S18").model["0.weight"] == begun["0.weight"]).all()
    assert (ended.tensors()["0.weight"] != begun["0.weight"]).all()
    first, second = (read_newest(maker.paths(run_id)) for run_id in ("whole", "cut"))
    assert "0.weight" in first.state["trainer"]["optimizer"]["parameters"]
    assert bits(second.model) == bits(first.model)
    assert bits(second.state["trainer"]["optimizer"]) == bits(first.state["trainer"]["optimizer"])


class Replace(CallbackBase):
    """Replaces the head."""

    def __init__(self, hook, **kwargs):
        super().__init__(**kwargs)
        self.hook = hook

    def _before_training(self, update_counter):
        if self.hook == "before_training":
            self.model.module[2] = nn.Linear(8, 3)

    def _after_update(self, update_counter):
        if self.hook == "after_update":
            self.model.module[2].bias = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("hook", "named", "update"), [("before_training", "'2.weight' and 1 more", 0), ("after_update", "'2.bias'", 3)]
)
def test_what_is_replaced_is_an_error_that_names_it(maker, hook, named, update):
    run = maker.run({"replace": (Replace, {"hook": hook})}, model=frozen())
    with pytest.raises(KsuitError, match=f"the optimizer does not have {named}, replaced or added"):
        train(run)
    assert run.counter.update == update
