"""What a callback draws belongs to it, its hook and the update; nothing changes it, and it changes nothing."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.config.factory import Factory
from ksuit_runner.engine.assembly import Assembly
from ksuit_runner.engine.hooks import HOOKS
from ksuit_runner.engine.loop import train
from ksuit_runner.keyed_random import mix, seed_all, uses_no_rng
from ksuit_runner.trainer.sgd import SgdTrainer

DRAWN = ("before_training", *(hook for hook in HOOKS if hook not in ("before_training", "on_exception")))
UPDATES = {"every_n_updates": 1}


def draw():
    return torch.rand(()).item(), float(np.random.random()), random.random()


class Notes(PeriodicCallback):
    """Goes through a dataset in every hook, and notes what it then draws."""

    def __init__(self, drawn, goes_through="test", **kwargs):
        super().__init__(**kwargs)
        self.drawn, self.goes_through = drawn, goes_through

    def _note(self, hook):
        for _ in self.data_container.evaluation_batches(self.goes_through) if self.goes_through else ():
            pass
        numbers = self.drawn.setdefault((self.name, hook, self.trainer.counter.update), [])
        numbers.append(draw())


class Gambler(Notes):
    """Draws more than others do, and seeds the generators."""

    def _note(self, hook):
        draw(), np.random.randn(3), torch.manual_seed(random.randrange(99))


class Fails(Notes):
    """Fails once, after it has drawn."""

    has_failed = False

    def _note(self, hook):
        draw()
        if hook == "after_update" and self.trainer.counter.update == 3 and not Fails.has_failed:
            Fails.has_failed = True
            raise ArithmeticError


for _hook in (*DRAWN, "periodic_callback"):
    setattr(Notes, f"_{_hook}", lambda self, _hook=_hook, **arguments: self._note(_hook))


class Results(DatasetCallback):
    """Draws for each batch and for the results, as a bootstrap does."""

    def __init__(self, drawn, **kwargs):
        super().__init__(**kwargs)
        self.drawn = drawn

    def _process_batch(self, batch, models):
        for _ in models:
            draw()

    def _process_results(self, update_counter):
        self.drawn[self.name, update_counter.update] = draw()


def notes(drawn, **given):
    return Notes, {"drawn": drawn, **UPDATES, **given}


def run(maker, callbacks, **kwargs):
    kwargs = {"max_updates": 5, "accumulation_steps": 2, "run_id": f"run{len(maker.runs)}", **kwargs}
    made = maker.run(callbacks, **kwargs)
    train(made)
    return made


@pytest.fixture
def expected(maker):
    """What a callback draws in a run without workers and with no other callback."""
    drawn = {}
    run(maker, {"notes": notes(drawn)})
    return drawn


def test_every_hook_and_update_draws_numbers_of_its_own(maker, expected):
    assert {hook for _, hook, _ in expected} == {*DRAWN, "periodic_callback"} - {"after_log"}
    numbers = [number for numbers in expected.values() for drawn in numbers for number in drawn]
    assert len(expected["notes", "before_every_backward", 0]) == 2, "one for each accumulation step"
    assert len(set(numbers)) == len(numbers) > 100
    drawn = {}
    run(maker, {"other": notes(drawn)})
    assert not {*numbers} & {number for numbers in drawn.values() for drawn in numbers for number in drawn}


@pytest.mark.parametrize("kind", ["workers", "no evaluation", "before", "after"])
def test_what_a_callback_draws_is_the_same_whatever_else_happens(maker, expected, kind):
    drawn = {}
    gambler = {"gambler": (Gambler, {"drawn": {}, **UPDATES})}
    callbacks = {
        "workers": {"notes": notes(drawn)},
        "no evaluation": {"notes": notes(drawn, goes_through=None)},
        "before": {**gambler, "notes": notes(drawn)},
        "after": {"notes": notes(drawn), **gambler},
    }
    run(maker, callbacks[kind], num_workers=2 if kind == "workers" else 0)
    assert drawn == expected


def test_a_failure_and_a_resume_change_nothing(maker, expected):
    drawn, after = {}, {}
    fails = (Fails, {"drawn": {}, **UPDATES})
    with pytest.raises(ArithmeticError):
        run(maker, {"fails": fails, "notes": notes(drawn)}, run_id="again")
    run(maker, {"fails": fails, "notes": notes(after)}, run_id="again", resume=True)
    beginning = [("notes", "before_training", update) for update in (0, 3)]
    assert drawn[beginning[0]] == after[beginning[1]] == expected[beginning[0]]
    drawn.pop(beginning[0]), after.pop(beginning[1]), expected.pop(beginning[0])
    assert not drawn.keys() & after.keys()
    assert {**drawn, **after} == expected


def test_a_newer_version_draws_the_same_after_a_resume(expected):
    """What the numbers are keyed by is as good as stored in every run that is not finished."""
    for hook, update, part in (
        ("before_training", 0, 0),
        ("before_every_update", 4, 0),
        ("before_every_backward", 4, 1),
        ("after_update", 4, ""),
    ):
        seed_all(mix(3, "callback", "notes", hook, update, part))
        assert expected["notes", hook, update][part or 0] == draw()


class Noisy(nn.Module):
    """Draws a number in the forward pass, and more when it is evaluated."""

    def forward(self, inputs):
        return inputs + 0 * torch.rand(())


def test_results_of_an_evaluation_do_not_depend_on_weights_that_others_offer(maker):
    one, two = {}, {}
    results = {"dataset_key": "test", **UPDATES}
    run(maker, {"r": (Results, {"drawn": one, **results})})
    made = maker.run({"r": (Results, {"drawn": two, **results})}, max_updates=5, run_id="two", num_workers=1)
    made.trainer.add_evaluation_model("more", Noisy())
    train(made)
    assert one == two and len(set(one.values())) == 5


class DrawsLate(torch.autograd.Function):
    """Adds noise to gradients, from each generator."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + 0.1 * sum(draw()))


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs):
        return DrawsLate.apply(self.linear(inputs * (1 + torch.rand(inputs.shape))))


class Langevin(torch.optim.SGD):
    """Adds noise to the weights, from each generator."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(torch.randn_like(parameter) * 0.01 + np.random.randn() * 0.01 + random.gauss(0, 0.01))


class Augments(SgdTrainer):
    """Draws where a part of a batch is moved."""

    def to_device(self, batch):
        inputs, targets = super().to_device(batch)
        return inputs + sum(draw()), targets


@pytest.mark.parametrize("trainer_class", [SgdTrainer, Augments])
def test_training_that_draws_late_or_early_is_undisturbed(maker, monkeypatch, trainer_class, bits):
    left = []
    for callbacks, workers in (({}, 0), ({"g": (Gambler, {"drawn": {}, **UPDATES}), "n": notes({})}, 0), ({}, 2)):
        torch.manual_seed(0)
        model = Late()
        optimizer = lambda parameters: Langevin(parameters, lr=0.1)  # noqa: E731
        trainer = maker.trainer(model=model, optimizer=optimizer, num_workers=workers, accumulation_steps=2)
        trainer.__class__ = trainer_class
        with monkeypatch.context() as patch:
            patch.setattr(maker, "trainer", lambda trainer=trainer: trainer)
            made = maker.run(callbacks, run_id=f"run{len(maker.runs)}")
        train(made)
        left.append(bits(trainer.model.tensors()))
    assert left[0] == left[1] == left[2]


class Silent(CallbackBase):
    @uses_no_rng
    def _after_update(self, update_counter):
        self.before = draw()


def test_a_hook_that_says_it_uses_no_rng_is_not_keyed_and_one_that_overrides_it_is(maker):
    class Loud(Silent):
        def _after_update(self, update_counter):
            super()._after_update(update_counter)

    kept = maker.run({"a": (Silent, {}), "b": (Loud, {})}).hooks
    (silent, loud), state = kept.methods("after_update"), torch.get_rng_state()
    kept.fire_round([silent], update_counter=None)
    torch.set_rng_state(state)
    assert kept.callbacks["a"].before[0] == torch.rand(()).item()
    torch.manual_seed(1)
    kept.fire_round([loud], update_counter=None)
    first = kept.callbacks["b"].before
    kept.fire_round([loud], update_counter=None)
    assert kept.callbacks["b"].before == first


class Lucky(CallbackBase):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.number = draw()


def test_a_constructor_draws_by_its_name(maker, monkeypatch):
    made = maker.run()
    collaborators = {
        "trainer": made.trainer,
        "model": made.trainer.model,
        "data_container": made.data,
        "tracker": None,
        "log_writer": made.log_writer,
        "checkpoint_writer": made.checkpoint_writer,
        "metric_property_provider": None,
    }

    def numbers(*own, default=()):
        config = {"seed": 5}
        config["callbacks"], config["default_callbacks"] = (
            {name: {"_target_": f"{__name__}.Lucky"} for name in names} for names in (own, default)
        )
        built = Assembly(Factory(config), config, made.trainer, None)._callbacks(collaborators)
        return {name: callback.number for name, callback in built.items()}

    torch.manual_seed(0)
    expected = torch.rand(()).item()
    torch.manual_seed(0)
    both = numbers("a", "b")
    assert torch.rand(()).item() == expected
    assert numbers("c", "b", default=["a"]) == {**numbers("c"), **both}
    assert len({*both["a"], *both["b"]}) == 6
