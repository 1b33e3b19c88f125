import logging
from functools import wraps

import pytest
import torch

from ksuit_runner.callback_base import CallbackBase, template
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.engine.hooks import HOOKS, Hooks
from ksuit_runner.models.base import ModelBase

ARGUMENTS = {
    "on_exception": {"error": ValueError("x")},
    "before_every_accumulation_step": {"update_counter": None, "batch": 1},
    "before_every_backward": {"update_counter": None, "losses": {}},
    "track_after_accumulation_step": {"update_counter": None, "batch": 1, "losses": {}, "outputs": 2},
    "after_log": {"update_counter": None, "metrics": {}},
}


@pytest.fixture
def make(maker):
    def make(cls, name="mine", **arguments):
        return maker.run({name: (cls, arguments)}).hooks.callbacks[name]

    return make


@pytest.mark.parametrize("hook", [*HOOKS, "periodic_callback", "timed_callback"])
def test_overriding_a_template_is_an_error_when_the_class_is_defined(hook):
    with pytest.raises(TypeError, match=f"Mine overrides the template '{hook}': override '_{hook}' instead"):
        type("Mine", (PeriodicCallback,), {hook: lambda self, update_counter: None})


def test_a_template_is_protected_in_classes_further_down_too():
    class Middle(CallbackBase):
        def _before_training(self, update_counter):
            """A protected hook may be overridden."""

    with pytest.raises(TypeError, match="'before_training'"):
        type("Mine", (Middle,), {"before_training": lambda self, update_counter: None})


def test_a_mixin_and_a_wrapper_override_templates_as_little():
    class Mixin:
        def before_training(self, update_counter):
            """Would run with gradients."""

    with pytest.raises(TypeError, match="'before_training'"):
        type("Mine", (Mixin, CallbackBase), {})
    wrapper = wraps(CallbackBase.before_training)(lambda self, update_counter: None)
    with pytest.raises(TypeError, match="'before_training'"):
        type("Mine", (CallbackBase,), {"before_training": wrapper})


@pytest.mark.parametrize("hook", HOOKS)
def test_a_template_calls_the_protected_hook_without_gradients(make, hook):
    seen = []

    def protected(self, **arguments):
        seen.append((torch.is_grad_enabled(), arguments))

    arguments = ARGUMENTS.get(hook, {"update_counter": None})
    getattr(make(type("Mine", (CallbackBase,), {f"_{hook}": protected})), hook)(**arguments)
    assert seen == [(False, arguments)]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("hook", HOOKS)
def test_arguments_are_fixed(make, hook):
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        getattr(make(CallbackBase), hook)(**ARGUMENTS.get(hook, {"update_counter": None}), other=1)


def test_a_template_of_ones_own(make):
    class Mine(CallbackBase):
        @template
        def on_sunday(self):
            self.grad = torch.is_grad_enabled()

    mine = make(Mine)
    mine.on_sunday()
    assert mine.grad is False
    with pytest.raises(TypeError, match="'on_sunday'"):
        type("Other", (Mine,), {"on_sunday": lambda self: None})


def test_gradients_are_on_again_after_an_error(make):
    class Broken(CallbackBase):
        def _after_update(self, update_counter):
            _ = 1 / 0

    broken = make(Broken)
    with pytest.raises(ZeroDivisionError):
        broken.after_update(None)
    assert torch.is_grad_enabled()


def test_metrics_go_under_the_name_of_the_callback(make):
    class Mine(CallbackBase):
        def _after_update(self, update_counter):
            self.source = self.writer.source

    mine = make(Mine, name="ema_slow")
    mine.after_update(None)
    assert mine.source == "ema_slow"


def test_what_a_callback_is_handed(maker, caplog):
    run = maker.run({"mine": (CallbackBase, {})})
    mine = run.hooks.callbacks["mine"]
    assert mine.trainer is run.trainer
    assert mine.model is run.trainer.model
    assert mine.data_container is run.data
    assert mine.writer is run.log_writer
    assert mine.checkpoint_writer is run.checkpoint_writer
    assert mine.path_provider is run.checkpoint_writer.path_provider
    assert mine.path_provider.output_path == maker.folder / "runs" / "run00000"
    caplog.set_level(logging.INFO)
    mine.logger.info("hello")
    assert [record.name for record in caplog.records] == ["ksuit_runner.callbacks.mine"]


def test_a_callback_has_no_name_before_a_run_gives_it_one(make):
    mine = make(CallbackBase)
    given = ("trainer", "model", "data_container", "tracker", "checkpoint_writer", "metric_property_provider")
    other = CallbackBase(log_writer=mine.writer, **{name: getattr(mine, name) for name in given})
    assert (other.name, other.display_name) == (None, "CallbackBase")
    Hooks({"mine": other}, mine.trainer.counter)
    assert other.name == "mine"


def test_a_callback_has_no_state_unless_it_says_so(make, maker):
    mine = make(CallbackBase)
    assert mine.state_dict() is None
    mine.load_state_dict({})
    mine.resume_from_checkpoint(maker.paths(), ModelBase(torch.nn.Linear(1, 1)))
    mine.close()
