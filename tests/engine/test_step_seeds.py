"""What training steps draw from numpy and random: seeded for an update only once one has drawn."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from ranks import on_ranks
from run_maker import Maker
from torch import nn
from torch.optim import SGD

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.ddp import DataParallel
from ksuit_runner.engine import host_mark, step_seeds
from ksuit_runner.engine.loop import train
from ksuit_runner.engine.restore import restore
from ksuit_runner.keyed_random import seed_host
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.trainer.sgd import SgdTrainer

DRAWS_AT = (3, 6)
EVERY = {"checkpoint": {"every_n_updates": 1, "keep_last": 20}}


class Sometimes(nn.Module):
    """Adds noise from numpy and random, and from torch, in some of the training steps only."""

    def __init__(self, draws_at=DRAWS_AT):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.draws_at, self.drawn = draws_at, {}
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, inputs):
        outputs = self.linear(inputs * (1 + 0.1 * torch.rand(inputs.shape)))
        if not self.training:
            return outputs
        self.steps += 1
        if (step := self.steps.item() - 1) in self.draws_at:
            self.drawn[step] = random.gauss(0, 1), np.random.randn()
            outputs = outputs * (1 + 0.1 * sum(self.drawn[step]))
        return outputs


class Rolls(CallbackBase):
    """Draws in every hook around the pieces of a step."""

    def _roll(self, **arguments):
        random.random(), np.random.random(), torch.rand(())

    _before_every_update = _before_every_accumulation_step = _before_every_backward = _roll
    _track_after_accumulation_step = _before_every_optimizer_step = _after_update = _roll


class Fails(CallbackBase):
    """Fails in the middle of an update, once."""

    def __init__(self, at, **kwargs):
        super().__init__(**kwargs)
        self.at = at

    def _before_every_backward(self, update_counter, losses):
        if update_counter.update == self.at:
            raise ArithmeticError


class Evaluates(PeriodicCallback):
    def _periodic_callback(self, update_counter):
        for _ in self.data_container.evaluation_batches("test"):
            pass


class Langevin(SGD):
    """Adds noise from every generator after a step, and evaluates the batch a few times before it."""

    def __init__(self, parameters, lr, evaluations=0, noise=0.01):
        super().__init__(parameters, lr)
        self.evaluations, self.noise = evaluations, noise

    def step(self, closure):
        for _ in range(self.evaluations):
            self._add_noise()
            closure()
        super().step()
        self._add_noise()

    @torch.no_grad()
    def _add_noise(self):
        for parameter in self.param_groups[0]["params"] if self.noise else ():
            parameter.add_(torch.randn_like(parameter), alpha=self.noise * (1 + random.random() + np.random.random()))


class Mixes(SgdTrainer):
    """Draws what all parts of a batch have in common."""

    def start_update(self, parts):
        self.share = torch.rand(()) + random.random() + np.random.random()
        return super().start_update(parts)

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        return {"total": losses["total"] * (1 + self.share if model.training else 1)}, outputs


def options(steps=1, draws_at=DRAWS_AT, **more):
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    given = {"model": Sometimes(draws_at), "accumulation_steps": steps, "optimizer": optimizer, "max_updates": 9}
    return {**given, **EVERY, **more}


def drawn_by(run):
    return run.trainer.model.module.drawn


def assert_same_end(maker, bits, *run_ids):
    first, *others = (read_newest(maker.paths(run_id)) for run_id in run_ids)
    for other in others:
        assert bits(other.model) == bits(first.model)
        for key in ("trainer", "draws_on_host"):
            assert bits(other.state[key]) == bits(first.state[key])


@pytest.mark.parametrize("is_known", [True, False], ids=["by positions", "by states"])
def test_a_resume_at_any_update_draws_what_the_whole_run_has_drawn(maker, bits, monkeypatch, is_known):
    if not is_known:  # the machine that it is resumed on may have another Python
        monkeypatch.setattr(host_mark, "_positions", lambda source: None)
    whole = maker.run(**options())
    train(whole)
    assert list(drawn_by(whole)) == list(DRAWS_AT)
    monkeypatch.undo()
    for update in range(1, 9):
        random.seed(update), np.random.seed(update)
        resumed = maker.resumed(update=update, **options())
        train(resumed)
        assert drawn_by(resumed) == {step: drawn for step, drawn in drawn_by(whole).items() if step >= update}
        assert_same_end(maker, bits, "run00000", "run00000-resumed")
        maker.paths("run00000-resumed").run_dir.rename(maker.folder / f"resumed-{update}")


@pytest.mark.parametrize("at", [2, 3, 4, 6])
def test_an_update_that_is_rolled_back_has_drawn_nothing(maker, bits, at):
    whole = maker.run(**options())
    train(whole)
    with pytest.raises(ArithmeticError):
        train(maker.run({"fails": (Fails, {"at": at})}, run_id="again", **options()))
    train(maker.run({"fails": (Fails, {"at": -1})}, run_id="again", resume=True, **options()))
    assert_same_end(maker, bits, "run00000", "again")


@pytest.mark.parametrize("draws_at", [DRAWS_AT, ()], ids=["draws", "does not draw"])
@pytest.mark.parametrize("steps", [1, 2])
def test_callbacks_that_draw_or_evaluate_change_nothing(maker, bits, draws_at, steps):
    callbacks = {
        "alone": {},
        "rolls": {"rolls": (Rolls, {})},
        "evaluates": {"evaluates": (Evaluates, {"every_n_updates": 2})},
    }
    for run_id, given in callbacks.items():
        random.seed(run_id), np.random.seed(len(run_id))
        run = maker.run(given, run_id=run_id, **options(steps, draws_at))
        train(run)
        assert run.seeds.draws_on_host is (steps == 1 and bool(draws_at))
    assert_same_end(maker, bits, *callbacks)


def test_every_update_that_draws_draws_other_numbers(maker):
    run = maker.run(**options(draws_at=range(9)))
    train(run)
    numbers = [number for drawn in drawn_by(run).values() for number in drawn]
    assert len(set(numbers)) == len(numbers) == 18


class FirstOnly(Sometimes):
    """Draws in the first evaluation of a batch only, and not in those that the optimizer asks for."""

    evaluations = 0

    def forward(self, inputs):
        self.evaluations += self.training
        self.draws_at = range(9) if self.evaluations % 2 else ()
        return super().forward(inputs)


def test_a_draw_in_an_evaluation_before_the_last_one_of_an_update_counts(maker):
    optimizer = partial(Langevin, lr=0.1, evaluations=1, noise=0)
    run = maker.run(**options(model=FirstOnly(), optimizer=optimizer))
    train(run)
    assert run.seeds.draws_on_host
    assert len(set(drawn_by(run).values())) == 9


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("given", [{"trainer_class": Mixes}, {"optimizer": partial(Langevin, lr=0.1, evaluations=2)}])
def test_what_a_trainer_or_an_optimizer_draws_is_the_same_after_a_resume(maker, bits, given, steps):
    given = {"num_workers": 1, **options(steps), **given}  # what fetches a batch here would seed the generators
    train(maker.run(**given))
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    train(maker.resumed({"rolls": (Rolls, {})}, update=4, strict=False, **given))
    first, second = (read_newest(maker.paths(run_id)) for run_id in ("run00000", "run00000-resumed"))
    assert bits(second.model) == bits(first.model)


def weights_of_ranks(folder):
    world = connect({})
    maker = Maker(folder)
    optimizer = partial(Langevin, lr=0.1, evaluations=2)
    given = {"trainer_class": Mixes, "optimizer": optimizer, "strategy": DataParallel(world), "world": world}
    run = maker.run(run_id=f"on-{world.size}", **options(2, **given, checkpoint={"world": world}))
    train(run)
    maker.close()
    run.meeting.settle(None)
    world.close()
    return [parameter.tolist() for parameter in run.trainer.model.parameters()]


def test_ranks_draw_the_same_for_what_they_do_alike(tmp_path):
    first, second = on_ranks(2, weights_of_ranks, tmp_path)
    (alone,) = on_ranks(1, weights_of_ranks, tmp_path)
    assert first == second == alone


def test_the_state_of_an_earlier_version_goes_on_as_it_was(maker):
    """Its runs have drawn what the position says, at every update."""
    train(maker.run(**options(max_updates=2)))
    old = read_newest(maker.paths())
    del old.state["draws_on_host"]
    run = maker.run(run_id="old", **options())
    restore(run, old, Origin(Mode.RESUME, "run00000"), strict=True)
    assert run.seeds.draws_on_host


def test_generators_that_nothing_draws_from_are_seeded_once(maker, monkeypatch):
    keys = []
    monkeypatch.setattr(step_seeds, "seed_host", lambda key: (keys.append(key), seed_host(key)))
    train(maker.run(model=nn.Linear(4, 3), num_workers=1, checkpoint={"every_n_updates": 100}))
    assert len(keys) == 1
