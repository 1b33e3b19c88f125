"""A run that fails or is interrupted in an update resumes from its last full update, exactly."""

import signal
import traceback
from contextlib import suppress
from functools import partial

import pytest
import torch
from run_maker import points
from torch import nn

from callbacks.accuracy import Accuracy
from callbacks.ema import Ema
from callbacks.train_loss import TrainLoss
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.checkpoint.folders import read_tags
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.checkpoint.host_buffers import HostBuffers
from ksuit_runner.engine.hooks import HOOKS
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError, ConfigError, KsuitError, LossError, ResumeError, StopTraining
from ksuit_runner.keyed_random import keyed
from ksuit_runner.trainer.sgd import SgdTrainer

FAULTS = [hook for hook in HOOKS if hook not in ("before_training", "on_exception")]
BEFORE_STEP = FAULTS[1:5]


class Fault(PeriodicCallback):
    """Counts its hooks, logs, and fails in one of them, with its state half changed, while asked to."""

    def __init__(self, hook=None, update=5, **kwargs):
        super().__init__(**kwargs)
        self.hook, self.update, self.count = hook, update, 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]

    def _act(self, hook, counter):
        self.count += 1
        if hook not in BEFORE_STEP and hook != "after_log":
            self.writer.add_scalar(f"count/{hook}", self.count)
        if hook == self.hook and counter.update >= self.update:
            raise ZeroDivisionError("my fault")


def _acting(hook):
    return lambda self, update_counter, **arguments: self._act(hook, update_counter)


for _hook in (*FAULTS, "periodic_callback"):
    setattr(Fault, f"_{_hook}", _acting(_hook))


class Slow(DatasetCallback):
    """An evaluation in the middle of which a signal arrives."""

    def __init__(self, update=None, **kwargs):
        super().__init__(**kwargs)
        self.update, self.interruption = update, None

    def _process_batch(self, batch, models):
        if self.trainer.counter.update == self.update:
            self.data_container.interruption.handle(signal.SIGTERM, None)

    def _process_results(self, update_counter):
        self.writer.add_scalar("slow", update_counter.update)


class FaultyModel(nn.Module):
    """Has statistics that change in the forward pass, which then fails at one update."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.fails_at, self.calls = fails_at, 0
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("hidden", None)

    def forward(self, inputs):
        outputs = self.layers(inputs) - self.center
        if self.training:
            self.center = 0.9 * self.center + 0.1 * outputs.mean(0).detach()
            self.total.data += self.center
            self.hidden = outputs[: 1 + int(self.total.abs().sum()) % 3].detach()
        self.calls += self.training
        if self.training and self.calls == self.fails_at:
            raise ZeroDivisionError("the model's fault")
        return outputs


def new_run(maker, run_id, hook=None, update=5, fails_at=None, signal_at=None, **kwargs):
    callbacks = {
        "loss": (TrainLoss, {"every_n_updates": 4}),
        "ema": (Ema, {"decays": [0.9]}),
        "first": (Fault, {"every_n_updates": 2}),
        "accuracy": (Accuracy, {"dataset_key": "test", "every_n_epochs": 1}),
        "slow": (Slow, {"dataset_key": "test", "every_n_epochs": 1, "update": signal_at}),
        "fault": (Fault, {"every_n_updates": 5, "hook": hook, "update": update}),
        "last": (Fault, {"every_n_epochs": 1}),
    }
    checkpoint = {"every_n_epochs": 1, "keep_last": 9}
    options = {"accumulation_steps": 2, "max_updates": 10, "checkpoint": checkpoint, **kwargs}
    for name in ("first", "last"):
        callbacks[name] = (type(name.title(), (Fault,), {"_act": _quiet}), callbacks[name][1])
    with keyed(3, "model"):
        model = FaultyModel(fails_at)
    return maker.run(callbacks, run_id, model=model, **options)


def _quiet(self, hook, counter):
    self.count += 1
    if hook in ("after_update", "after_training", "periodic_callback"):
        self.writer.add_scalar(f"{self.name}/{hook}", self.count)


def result(maker, run_id):
    found = read_newest(maker.paths(run_id))
    run = next(run for run in reversed(maker.runs) if run.checkpoint_writer.path_provider.run_id == run_id)
    recorded = points(run)
    assert len({point[:2] for point in recorded}) == len(recorded)
    folders = found.paths.checkpoints_dir.glob("E*")
    files = {f"{path.name}/{file.name}": file.read_bytes() for path in folders for file in path.iterdir()}
    return found.progress, files, sorted(recorded)


@pytest.fixture
def undisturbed(maker):
    train(new_run(maker, "whole000"))
    return result(maker, "whole000")


def resumed(maker, **kwargs):
    train(new_run(maker, "broken00", resume=True, **kwargs))
    return result(maker, "broken00")


def assert_same(one, other):
    assert one[0] == other[0]
    assert sorted(set(one[2]) ^ set(other[2])) == []
    # That of the fault is one checkpoint more. Where both have one, it is the same, the manifest included.
    assert [name for name in other[1] if one[1].get(name) != other[1][name]] == []


@pytest.mark.parametrize("hook", [*FAULTS, "periodic_callback"])
def test_a_fault_in_a_hook(maker, undisturbed, hook):
    update = 10 if hook == "after_training" else 6 if hook == "after_epoch" else 5
    with pytest.raises(ZeroDivisionError, match="my fault") as info:
        train(new_run(maker, "broken00", hook=hook, update=update))
    assert f"raised in callback 'fault', hook {hook}" in info.value.__notes__
    assert read_newest(maker.paths("broken00")).progress.update == update
    assert_same(resumed(maker), undisturbed)


@pytest.mark.parametrize("call", [1, 9, 10])
def test_a_fault_in_the_model(maker, undisturbed, call):
    with pytest.raises(ZeroDivisionError, match="the model's fault") as info:
        train(new_run(maker, "broken00", fails_at=call))
    assert info.value.__notes__ == [f"raised in update {(call + 1) // 2}"]
    assert read_newest(maker.paths("broken00")).progress.update == (call - 1) // 2
    assert_same(resumed(maker), undisturbed)


class Eager(CallbackBase):
    """Asks for a checkpoint and for the end of training before an update has changed anything."""

    def _before_every_update(self, update_counter):
        if update_counter.update == 5:
            self.checkpoint_writer.request("eager")
            raise StopTraining("enough")


def test_the_requests_of_a_failed_update_are_rolled_back(maker):
    callbacks = {"eager": (Eager, {}), "fault": (Fault, {"hook": "before_every_backward", "every_n_updates": 1})}
    with pytest.raises(ZeroDivisionError):
        train(maker.run(callbacks, checkpoint={"every_n_updates": 2}))
    found = read_newest(maker.paths())
    assert (found.progress.update, found.tags, read_tags(maker.paths())) == (5, (), {})
    callbacks["fault"] = (Fault, {"every_n_updates": 1})
    train(maker.run(callbacks, checkpoint={"every_n_updates": 2}, resume=True))
    assert read_newest(maker.paths()).progress.update == 6, "training was to end after the update, done again"
    assert read_tags(maker.paths()) == {"eager": "E2_U6_S36"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_the_data(maker, undisturbed, workers):
    run, fetched = new_run(maker, "broken00", num_workers=workers), []

    class Broken(type(run.data.train_dataset)):
        def __getitem__(self, index):
            fetched.append(index)
            if len(fetched) == 27:
                raise LookupError("a broken file")
            return super().__getitem__(index)

    run.data.train_dataset.__class__ = Broken
    with pytest.raises(LookupError) as info:
        train(run)
    text = "".join(traceback.format_exception(info.value))
    assert "a broken file" in text and "raised by data.datasets.train, in batch 1 of epoch 2" in text
    assert "raised after update 4" in text
    assert read_newest(maker.paths("broken00")).progress.update == 4
    assert_same(resumed(maker), undisturbed)


class Recurrent(SgdTrainer):
    """Carries what it has seen from update to update, and fails in one of them with that half changed."""

    def __init__(self, *args, fails_at=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.fails_at, self.seen, self.hidden = fails_at, [], torch.zeros(3)

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        self.seen.append(losses["total"].item())
        self.hidden.add_(outputs.detach().mean(0))
        if self.counter.update == self.fails_at:
            raise ZeroDivisionError
        return {"total": losses["total"] + (outputs.mean(0) * self.hidden).sum()}, outputs

    def extra_state(self):
        return {"seen": self.seen, "hidden": self.hidden}

    def load_extra_state(self, state):
        self.seen, self.hidden = state["seen"], state["hidden"]


def test_the_extra_state_of_a_trainer_is_that_of_the_last_full_update(maker):
    train(new_run(maker, "whole000", trainer_class=Recurrent))
    with pytest.raises(ZeroDivisionError):
        train(new_run(maker, "broken00", trainer_class=partial(Recurrent, fails_at=5)))
    assert len(read_newest(maker.paths("broken00")).state["trainer"]["extra"]["seen"]) == 10
    assert_same(resumed(maker, trainer_class=Recurrent), result(maker, "whole000"))


@pytest.mark.parametrize(
    ("first", "second", "which"), [(SgdTrainer, Recurrent, "out the"), (Recurrent, SgdTrainer, " an")]
)
def test_a_trainer_with_another_extra_state_is_not_resumed_unless_that_is_allowed(maker, caplog, first, second, which):
    train(maker.run(trainer_class=first, max_updates=1))
    with pytest.raises(ResumeError, match=f"that of a trainer with{which} extra_state.*resume_strict=false"):
        maker.run(trainer_class=second, resume=True)
    maker.close()
    maker.run(trainer_class=second, resume=True, strict=False)
    assert "resume_strict=false: the extra_state of the trainer " in caplog.text


def test_a_skipped_update_leaves_the_extra_state_as_it_was(maker):
    run = maker.run(model=Diverging({3}), nan_loss="skip", trainer_class=Recurrent, max_updates=5)
    train(run)
    assert len(run.trainer.seen) == 4 and run.trainer.hidden.isfinite().all()


def test_a_trainer_that_overrides_the_whole_state_is_refused():
    with pytest.raises(TypeError, match="Own overrides 'state_dict': override 'extra_state' instead"):
        type("Own", (SgdTrainer,), {"state_dict": lambda self: {}})


def test_a_trainer_with_a_method_that_nothing_calls_is_refused_when_it_is_defined():
    with pytest.raises(TypeError, match="Own has a method 'split', which nothing calls: each part of a batch is"):
        type("Own", (SgdTrainer,), {"split": lambda self, batch: [batch]})
    with pytest.raises(TypeError, match="Own has a method 'update', which nothing calls: the attribute of this name"):
        type("Own", (SgdTrainer,), {"update": lambda self: None})
    for piece in ("backward", "forward_part", "roll_back", "skip_step"):  # of an update
        with pytest.raises(TypeError, match=f"method '{piece}', which nothing calls: override `start_update`"):
            type("Own", (SgdTrainer,), {piece: lambda self, *given: None})


class FaultyAdamW(torch.optim.AdamW):
    """Fails in its sixth step."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 6:
            raise MemoryError
        return super().step(closure)


def test_a_fault_in_the_optimizer_leaves_the_checkpoint_before_it(maker, undisturbed, caplog):
    run = new_run(
        maker, "broken00", checkpoint={"every_n_updates": 3, "keep_last": 9}, optimizer=partial(FaultyAdamW, lr=1e-2)
    )
    with pytest.raises(MemoryError):
        train(run)
    run.checkpoint_writer.wait()
    assert "the state after the last full update is lost" in caplog.text
    assert read_newest(maker.paths("broken00")).progress.update == 3
    assert_same(resumed(maker), undisturbed)


def test_a_fault_of_a_callback_with_files_leaves_the_checkpoint_before_it(maker, undisturbed, monkeypatch):
    run = new_run(maker, "broken00", checkpoint={"every_n_updates": 3, "keep_last": 9})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_lerp_", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(run)
    assert not list(maker.paths("broken00").checkpoints_dir.glob("E*"))
    train(new_run(maker, "broken00"))
    assert result(maker, "broken00") == undisturbed


@pytest.mark.parametrize("fails", ["the device", "a callback's exit", "the log"])
def test_a_fault_while_saving_hides_no_earlier_error(maker, monkeypatch, caplog, fails):
    """A failed GPU fails again in all that follows."""

    def fail(*_):
        raise SystemExit(3) if fails == "a callback's exit" else RuntimeError("CUDA error: illegal memory access")

    class Other(CallbackBase):
        def state_dict(self):
            return {}

    class Doomed(CallbackBase):
        def _track_after_update_step(self, update_counter):
            if update_counter.update == 3:
                where, name = {
                    "the device": (HostBuffers, "copy"),
                    "a callback's exit": (Other, "state_dict"),
                    "the log": (run.log_writer, "write_rest"),
                }[fails]
                monkeypatch.setattr(where, name, fail)
                raise ZeroDivisionError("my fault")

    run = maker.run({"other": (Other, {}), "doomed": (Doomed, {})}, "broken00")
    with pytest.raises(ZeroDivisionError, match="my fault"):
        train(run)
    assert "the last state could not be saved" in caplog.text
    monkeypatch.undo()


@pytest.mark.parametrize("update", [3, 6, 9])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_in_the_middle_of_an_evaluation(maker, undisturbed, update, workers):
    run = new_run(maker, "broken00", signal_at=update, num_workers=workers)
    train(run)
    assert run.counter.update == update and not run.is_finished
    state = read_newest(maker.paths("broken00")).state["unfinished"]
    assert state["phase"] == "AFTER_UPDATE" and "first.track_after_update_step" in state["done"]
    assert not {"accuracy.periodic_callback", "slow.periodic_callback"} & {*state["done"]}  # they share a pass
    assert_same(resumed(maker), undisturbed)


def test_interrupted_again_and_again_at_the_same_update(maker, undisturbed):
    train(new_run(maker, "broken00", signal_at=6))
    for _ in range(3):
        train(new_run(maker, "broken00", signal_at=6, resume=True))
    with pytest.raises(ZeroDivisionError):
        train(new_run(maker, "broken00", hook="after_log", update=6, resume=True))
    assert_same(resumed(maker), undisturbed)


class Diverging(nn.Module):
    """Its output is NaN at some calls in training."""

    def __init__(self, bad):
        super().__init__()
        self.layers, self.bad, self.calls = FaultyModel().layers, bad, 0

    def forward(self, inputs):
        self.calls += self.training
        outputs = self.layers(inputs)
        return outputs * float("nan") if self.training and self.calls in self.bad else outputs


def test_a_nan_loss_fails_at_its_update_and_keeps_the_state_before_it(maker):
    with pytest.raises(LossError, match="the loss of update 4 is nan"):
        train(maker.run(model=Diverging({4})))
    found = read_newest(maker.paths())
    assert found.progress.update == 3
    assert found.model["layers.1.num_batches_tracked"] == 3
    assert all(tensor.isfinite().all() for tensor in found.model.values())
    train(maker.run(model=Diverging({1}), resume=True, nan_loss="skip"))
    assert read_newest(maker.paths()).progress.update == 8


@pytest.mark.parametrize("policy", ["fail", "warn", "skip"])
def test_values_of_the_batch_are_named_as_what_makes_a_loss_nan(maker, caplog, policy):
    run = maker.run(nan_loss=policy, max_updates=3)
    dataset = run.data.train_dataset
    dataset.inputs = dataset.inputs.clone()
    dataset.inputs[:, 0] = float("inf")
    message = "the loss of update 1 is nan: not all values of its batch are finite"
    if policy == "fail":
        with pytest.raises(LossError, match=message):
            train(run)
        return
    with suppress(LossError):  # after all updates were skipped
        train(run)
    assert message in caplog.text


def test_a_nan_loss_is_skipped(maker, caplog):
    run = maker.run({"ema": (Ema, {})}, model=Diverging({4, 6}), nan_loss="skip")
    train(run)
    found = read_newest(maker.paths())
    assert all(tensor.isfinite().all() for tensor in found.model.values())
    assert found.model["layers.1.num_batches_tracked"] == 6
    assert [record.getMessage() for record in caplog.records if "loss" in record.getMessage()] == [
        f"the loss of update {update} is nan; it is skipped" for update in (4, 6)
    ]


def test_a_nan_loss_of_one_step_skips_the_update_after_the_last_step(maker):
    run = maker.run(model=Diverging({3}), nan_loss="skip", max_updates=2, accumulation_steps=2)
    train(run)
    assert run.trainer.model.module.calls == 4 and run.trainer.loss_check.skips == 1


@pytest.mark.parametrize(
    ("updates", "most", "bad", "fails_at"),
    [
        (8, 3, {2, 3, 5, 6, 7}, None),  # three in a row, with one that is finite before them
        (8, 2, {2, 3, 5, 6, 7}, 7),
        (8, 0, {3}, 3),
    ],
)
def test_nan_losses_are_skipped_up_to_a_number_in_a_row(maker, updates, most, bad, fails_at):
    run = maker.run(model=Diverging(bad), nan_loss="skip", max_skips=most, max_updates=updates)
    if fails_at is None:
        train(run)
        return
    with pytest.raises(LossError, match=f"trainer.max_skips: the loss of update {fails_at} is nan"):
        train(run)


class StopsAt(CallbackBase):
    """Ends the run early."""

    def _after_update(self, update_counter):
        if update_counter.update == 3:
            raise StopTraining("enough")


@pytest.mark.parametrize(("callbacks", "updates"), [({}, 4), ({"stops": (StopsAt, {})}, 3)])
def test_a_run_that_has_skipped_every_update_is_never_finished(maker, callbacks, updates):
    given = {"model": Diverging({1, 2, 3, 4}), "nan_loss": "skip", "max_updates": 4}
    run = maker.run(callbacks, **given)
    for _ in range(2):  # a resume finds the same
        with pytest.raises(LossError, match=rf"nan_loss: every update was skipped \({updates}\)"):
            train(run)
        assert (run.counter.update, run.is_finished) == (updates, False)
        maker.close()
        run = maker.run(callbacks, **given, resume=True)


def test_how_many_were_skipped_in_a_row_is_part_of_the_state(maker):
    run = maker.run(model=Diverging({3, 4}), nan_loss="skip", max_skips=2)
    run.counter.end_update = 4
    train(run)
    with pytest.raises(LossError, match="update 5 is nan, and the 2 before it were skipped"):
        train(maker.run(model=Diverging({1}), nan_loss="skip", max_skips=2, resume=True))


def test_a_nan_loss_is_warned_of(maker, caplog):
    train(maker.run(model=Diverging({8}), nan_loss="warn"))
    assert "the loss of update 8 is nan" in caplog.text


def test_losses_on_an_accelerator_are_looked_at_together(maker):
    run = maker.run({"loss": (TrainLoss, {"every_n_updates": 5})}, model=Diverging({3}))
    run.trainer.loss_check._is_late = True
    with pytest.raises(LossError, match="the loss of update 3 is nan"):
        train(run)
    assert run.counter.update == 5
    with pytest.raises(CheckpointError):
        read_newest(maker.paths())


def test_an_unknown_policy_is_refused(maker):
    with pytest.raises(ConfigError, match="nan_loss: there is no 'skp'. Did you mean 'skip'"):
        maker.trainer(nan_loss="skp")


class Unstorable(CallbackBase):
    """Has a state that cannot be read back safely, from the start or from an update on."""

    def __init__(self, value, update=0, **kwargs):
        super().__init__(**kwargs)
        self.value, self.update = value, update

    def state_dict(self):
        return {"seen": {"best": self.value if self.trainer.counter.update >= self.update else None}}

    def _after_update(self, update_counter):
        """Do nothing."""


@pytest.mark.parametrize("update", [0, 2])
def test_a_state_that_cannot_be_stored_is_found_when_it_appears(maker, update):
    run = maker.run({"odd": (Unstorable, {"value": {1, 2}.__iter__(), "update": update})})
    with pytest.raises(KsuitError, match=r"callbacks\.odd: state_dict\(\)\['seen'\]\['best'\]: a builtins.set_it"):
        train(run)
    assert run.counter.update == update
