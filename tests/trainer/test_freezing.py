"""Parameters that are frozen for a part of a run, or for all of it."""

import shutil
from functools import partial

import pytest
import torch
from torch import nn

from callbacks.ema import Ema
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError
from ksuit_runner.schedule import constant
from ksuit_runner.trainer.freezing import Freezing, frozen_for_good
from ksuit_runner.trainer.modes import Modes
from ksuit_runner.trainer.sgd import SgdTrainer


def network():
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(3)))
    return nn.Sequential(blocks, nn.Linear(4, 3))


FREEZE = {
    "blocks": {"layers": "0.{}.*", "until_epoch": 1, "every_n_updates": 2},  # three updates per epoch
    "head": {"match": ["1.bias"], "from_update": 4},
}
CHANGES = {"0.2": range(4, 9), "0.1": range(6, 9), "0.0": range(8, 9), "1.bias": range(1, 5), "1.weight": range(1, 9)}
# Momentum and weight decay would change a parameter without a gradient of its own, if they were applied.
GIVEN = {
    "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "checkpoint": {"every_n_updates": 1, "keep_last": 20},
    "max_updates": 8,
    "schedule": constant,
}


@pytest.mark.parametrize("optimizer", [GIVEN["optimizer"], partial(torch.optim.AdamW, lr=0.1)])
def test_what_is_frozen_stays_and_what_thaws_is_trained_exactly_over_a_resume(maker, bits, optimizer):
    given = {**GIVEN, "optimizer": optimizer}
    whole = maker.run({"ema": (Ema, {})}, model=network(), freeze=FREEZE, **given)
    train(whole)
    states = {0: network().state_dict()}
    states |= {n: read_newest(maker.paths(), f"E{n // 3}_U{n}_S{n * 6}").model for n in range(1, 9)}
    for name in states[0]:
        updates = next(found for prefix, found in CHANGES.items() if name.startswith(prefix))
        changed = [n for n in range(1, 9) if not torch.equal(states[n][name], states[n - 1][name])]
        assert changed == list(updates), name
    for update in (2, 3, 5):
        resumed = maker.resumed({"ema": (Ema, {})}, update=update, model=network(), freeze=FREEZE, **given)
        assert resumed.trainer.model.module[0][2][0].weight.requires_grad is (update >= 3)
        train(resumed)
        first, second = read_newest(maker.paths()), read_newest(resumed.checkpoint_writer.path_provider)
        assert bits(second.model) == bits(first.model) and bits(second.state) == bits(first.state)
        resumed.checkpoint_writer.close()
        shutil.rmtree(maker.paths("run00000-resumed").run_dir)


def test_a_wholly_frozen_module_computes_as_in_evaluation_until_it_thaws(maker):
    net = network()
    net[0][1][1].requires_grad_(False)  # by the model itself, and within what is frozen by a rule
    run = maker.run(model=net, freeze={"blocks": {"match": ["0.1.*", "0.2.1.*"], "until_update": 1}})
    modes, model = run.trainer.modes, run.trainer.model.module
    modes.start()
    for update, held in ((0, True), (1, False)):
        modes.evaluate()
        run.trainer.freezing.follow(update)
        assert not any(module.training for module in model.modules())
        modes.train()
        evaluating = [name for name, module in model.named_modules() if not module.training]
        assert evaluating == (["0.1", "0.1.0", "0.1.1", "0.1.2", "0.2.1"] if held else [])


def test_what_the_model_has_frozen_stays_frozen(maker):
    model = network()
    model[0][0].requires_grad_(False)
    run = maker.run(model=model, freeze={"all": {"match": ["0.*"], "until_update": 1}}, max_updates=3)
    run.trainer.freezing.apply(2)
    assert [name for name, item in model.named_parameters() if not item.requires_grad] == [
        *("0.0.0.weight", "0.0.0.bias", "0.0.1.weight", "0.0.1.bias")
    ]
    assert frozen_for_good(model, run.trainer.freezing).keys() == {
        "0.0.0.weight",
        "0.0.0.bias",
        "0.0.1.weight",
        "0.0.1.bias",
    }


class Counts(PeriodicCallback):
    logs = ("called",)

    def _periodic_callback(self, update_counter):
        self.writer.add_scalar("called", 1.0)


def test_a_run_without_updates_may_freeze_everything_and_calls_its_callbacks_once(maker):
    run = maker.run({"counts": (Counts, {"every_n_epochs": 5})}, model=network(), freeze=["*"], max_epochs=0)
    train(run)
    assert run.log_writer.summary["called"].last == 1.0 and run.is_finished


@pytest.mark.parametrize(
    ("freeze", "says"),
    [
        (["*"], "trainer.freeze: nothing is left to train. To evaluate only: trainer.max_epochs=0"),
        ({"late": {"match": ["*"], "from_update": 3}}, "trainer.freeze: from update 4 on nothing is left to train"),
        (["0.*", "heda.*"], "trainer.freeze: 'heda.*' matches no parameter"),
        ({"a": {"match": ["0.9.weight"]}}, r"trainer.freeze.a: '0.9.weight' matches no parameter. Did you mean '0.*"),
        ({"a": {"match": "0.*"}}, "trainer.freeze.a.match: a list of patterns of names is needed"),
        ({"a": {"match": ["0.*"], "untill": 3}}, "trainer.freeze.a.untill: there is no such setting"),
        ({"a": {"until_epoch": 3}}, "trainer.freeze.a.match: a list of patterns of names is needed: match, or layers"),
        (
            {"a": {"match": ["0.*"], "until_epoch": 1.5}},
            "trainer.freeze.a.until_epoch: a whole number is needed",
        ),
        ({"a": {"match": ["0.*"], "until_epoch": 1, "until_update": 2}}, "until_update and until_epoch exclude each"),
        ({"a": {"match": ["0.*"], "from_epoch": 1, "until_update": 2}}, "trainer.freeze.a: it ends before it begins"),
        ({"a": {"match": []}}, "trainer.freeze.a: it matches no parameter"),
        ({"a": {"layers": "0.{}.*", "until_epoch": 1}}, "given together: the layers thaw one by one"),
        ({"a": {"layers": "x.{}.*", "until_epoch": 1, "every_n_epochs": 1}}, r"'x.\{\}.\*' matches no parameter"),
    ],
)
def test_mistakes_are_explained(maker, freeze, says):
    with pytest.raises(ConfigError, match=says):
        maker.trainer(model=network(), freeze=freeze)


def test_a_stream_has_no_epochs():
    counter, model = UpdateCounter(None, 4, max_updates=3), network()
    with pytest.raises(ConfigError, match="trainer.freeze.a.until_epoch: the training data is a stream"):
        Freezing(
            {"a": {"match": ["0.*"], "until_epoch": 1}}, model, nn.Identity(), counter, Modes(model, nn.Identity())
        )


class TwoLosses(SgdTrainer):
    """Also has a loss that depends on the frozen part alone, with a count of its own."""

    def training_step(self, batch, model):
        outputs = model(batch[0])
        side = model.module[0](batch[0]).square().mean()
        return {"main": (self.loss(outputs, batch[1]), len(outputs)), "side": (side, 2 * len(outputs))}, outputs


def test_a_loss_of_what_is_frozen_has_no_gradient_and_is_no_error(maker):
    given = {"loss_weights": {"main": 1.0, "side": 1.0}, "accumulation_steps": 2, "max_updates": 1}
    run = maker.run(model=network(), freeze=["0.*"], trainer_class=TwoLosses, **given)
    train(run)
    assert run.counter.update == 1
