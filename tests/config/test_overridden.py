"""A method that is never called, or cannot be, is found when its class is defined."""

import pytest
import torch

from callbacks.accuracy import Accuracy
from ksuit_runner import CallbackBase, DatasetCallback, MetricCallback, PeriodicCallback, SgdTrainer
from ksuit_runner.tracker.base import BaseTracker
from ksuit_runner.tracker.noop import NoopTracker


def define(base, name, method):
    return type("Mine", (base,), {name: method, "__module__": __name__})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("_after_epoch_end", "_after_epoch"),
        ("on_train_epoch_end", "_after_epoch"),
        ("on_train_start", "_before_training"),
        ("on_save_checkpoint", "state_dict"),
        ("_before_update", "_before_every_update"),
        ("_before_train", "_before_training"),
        ("after_backward", "_before_every_backward"),
        ("_on_log", "_after_log"),
        ("_periodic_callbak", "_periodic_callback"),
        ("_track_after_update", "_track_after_update_step"),
        ("_beforetraining", "_before_training"),
    ],
)
def test_a_hook_that_does_not_exist_is_found(name, meant):
    with pytest.raises(TypeError, match=f"^Mine.{name} is no hook, and nothing calls it. Did you mean '{meant}'\\?$"):
        define(PeriodicCallback, name, lambda self, update_counter: None)


@pytest.mark.parametrize(
    ("base", "name", "method", "write"),
    [
        (CallbackBase, "_after_epoch", lambda self: 0, "_after_epoch(self, update_counter)"),
        (CallbackBase, "_after_epoch", lambda self, epoch: 0, "_after_epoch(self, update_counter)"),
        (CallbackBase, "_after_log", lambda self, update_counter: 0, "_after_log(self, update_counter, metrics)"),
        (PeriodicCallback, "_periodic_callback", lambda self, trainer: 0, "_periodic_callback(self, update_counter)"),
        (DatasetCallback, "_process_batch", lambda self, batch: 0, "_process_batch(self, batch, models)"),
        (MetricCallback, "_process_value", lambda self: 0, "_process_value(self, value)"),
        (Accuracy, "_process_results", lambda self: 0, "_process_results(self, update_counter)"),
        (CallbackBase, "state_dict", lambda self, prefix: 0, "state_dict(self)"),
        (CallbackBase, "load_state_dict", lambda self: 0, "load_state_dict(self, state_dict)"),
        (SgdTrainer, "training_step", lambda self, batch: 0, "training_step(self, batch, model)"),
        (SgdTrainer, "extra_state", lambda self, batch: 0, "extra_state(self)"),
    ],
)
def test_a_signature_that_does_not_fit_is_found(base, name, method, write):
    method.__name__ = name
    with pytest.raises(TypeError, match="^Mine.*is called with") as raised:
        define(base, name, method)
    assert str(raised.value).endswith(f"Write: def {write}")


@pytest.mark.parametrize("base", [NoopTracker, BaseTracker])
@pytest.mark.parametrize(
    ("name", "meant"),
    [("log_point", "log_points"), ("start_runs", "start_run"), ("warmup", "warm_up")],
)
def test_a_misspelt_method_of_a_tracker_is_found(base, name, meant):
    expected = f"^Mine.{name} overrides no method, and nothing calls it. Did you mean '{meant}'\\?$"
    with pytest.raises(TypeError, match=expected):
        define(base, name, lambda self, points: None)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("train_step", ". Did you mean 'training_step'?"),
        ("inputs_targets", ". Did you mean 'inputs_and_targets'?"),
        ("compute_loss", ": 'training_step' returns the losses"),
        ("validation_step", ": callbacks evaluate"),
        ("configure_optimizers", ": the config has them, in 'optimizer' and 'schedule'"),
        ("on_train_epoch_end", ": a callback has a hook for it, '_after_epoch'"),
        ("on_save_checkpoint", ": override 'extra_state'"),
    ],
)
def test_a_method_of_a_trainer_that_nothing_calls_is_found(name, instead):
    with pytest.raises(TypeError) as raised:
        define(SgdTrainer, name, lambda self, batch, model: None)
    assert str(raised.value) == f"Mine.{name} overrides no method, and nothing calls it{instead}"


def test_a_training_step_gets_a_model_and_no_index():
    with pytest.raises(TypeError, match=r"with the model to compute with, and not with 'batch_idx'\. Write: def train"):
        define(SgdTrainer, "training_step", lambda self, batch, batch_idx: None)
    define(SgdTrainer, "training_step", lambda *args: None)


def test_helpers_of_a_trainer_are_accepted():
    class Mine(SgdTrainer):
        def training_step(self, batch, model):
            return self.compute_loss(batch, model), None

        def compute_loss(self, batch, model):
            """Called by the class itself."""

    define(Mine, "compute_loss", lambda self, batch, model: None)

    class Decorated(SgdTrainer):
        @torch.autocast("cpu")
        def training_step(self, batch, model):
            return self.compute_loss(batch, model), self.weighted

        def compute_loss(self, batch, model):
            """Called by a method with a decorator."""

        @property
        def weighted(self):
            return self.weights()

        def weights(self):
            """Called by a property."""

    define(SgdTrainer, "_validation_step", lambda self, batch: None)
    define(SgdTrainer, "weights", lambda self: None)  # called by a callback


def test_helpers_of_a_tracker_are_accepted():
    define(NoopTracker, "_log_point", lambda self, point: None)
    define(NoopTracker, "flush", lambda self: None)

    class Mine(NoopTracker):
        def log_points(self, points):
            """Called once for all."""

        def log_point(self, point):
            """For code of the user's own, beside the method of nearly that name."""

        def upload(self, path, artifact_path):
            self.log_fils(path)

        def log_fils(self, path):
            """Called by the class itself."""

    define(Mine, "log_fils", lambda self, path: None)
    define(Mine, "log_point", lambda self, point: None)


def test_methods_that_are_called_are_accepted():
    define(CallbackBase, "_after_epoch", lambda self, **arguments: None)
    define(CallbackBase, "_after_epoch", lambda self, update_counter, verbose=False: None)
    define(CallbackBase, "load_state_dict", lambda self, state: None)
    define(SgdTrainer, "training_step", lambda self, batch, model, turn: None)
    define(CallbackBase, "reset", lambda self: None)

    class Watches(CallbackBase):
        def _before_training(self, update_counter):
            for module in self.model.modules():
                module.register_forward_hook(lambda *given: self._on_forward(*given))

        def _on_forward(self, module, inputs, outputs):
            """Nothing."""

    define(Watches, "_on_forward", lambda self, module, inputs, outputs: None)
