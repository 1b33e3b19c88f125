import pytest
import torch

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.data.batch_plan import BatchPlan
from ksuit_runner.data.fetch_batch import EVALUATION
from ksuit_runner.data.order import CheckedOrder, Shuffled
from ksuit_runner.engine.hooks import HOOKS
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ResumeError, StopTraining


class Diary(PeriodicCallback):
    """Notes every hook in a diary that all callbacks share."""

    def __init__(self, diary, **kwargs):
        super().__init__(**kwargs)
        self.diary = diary


def _note(hook):
    def note(self, **arguments):
        counter = arguments.get("update_counter")
        self.diary.append((self.name, hook, counter and counter.update))

    return note


for _hook in (*HOOKS, "periodic_callback"):
    setattr(Diary, f"_{_hook}", _note(_hook))


class Stopper(CallbackBase):
    def __init__(self, hook, update, **kwargs):
        super().__init__(**kwargs)
        self.hook, self.update = hook, update

    def _after_update(self, update_counter):
        self._stop("after_update", update_counter)

    def _before_training(self, update_counter):
        self._stop("before_training", update_counter)

    def _after_log(self, update_counter, metrics):
        self._stop("after_log", update_counter)

    def _stop(self, hook, counter):
        if hook == self.hook and counter.update == self.update:
            raise StopTraining("enough")


class Stateful(CallbackBase):
    def __init__(self, value=0, **kwargs):
        super().__init__(**kwargs)
        self.value = value
        self.paths = None

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]

    def resume_from_checkpoint(self, resumption_paths, model):
        self.paths = resumption_paths


def test_the_order_of_hooks_is_that_of_the_design(maker):
    diary = []
    run = maker.run({"d": (Diary, {"diary": diary, "every_n_updates": 2})}, max_epochs=1, accumulation_steps=2)
    train(run)
    step = ["before_every_accumulation_step", "before_every_backward", "track_after_accumulation_step"]
    steps = [*step, *step, "before_every_optimizer_step"]
    assert [hook for _, hook, _ in diary] == [
        "before_training",
        *["before_every_update", *steps, "track_after_update_step", "after_update"],
        *["before_every_update", *steps, "track_after_update_step", "after_update", "periodic_callback"],
        *["before_every_update", *steps, "track_after_update_step", "after_update", "after_epoch"],
        "after_training",
    ]
    updates = [update for _, hook, update in diary if hook in ("before_every_update", "track_after_update_step")]
    assert updates == [0, 1, 1, 2, 2, 3]


def test_what_counts_in_epochs_comes_after_the_epoch(maker):
    diary = []
    callbacks = {
        "epochs": (Diary, {"diary": diary, "every_n_epochs": 1}),
        "updates": (Diary, {"diary": diary, "every_n_updates": 3}),
    }
    train(maker.run(callbacks, max_epochs=1))
    last = [(name, hook) for name, hook, update in diary if update == 3 and hook != "after_training"]
    assert last == [
        ("epochs", "track_after_update_step"), ("updates", "track_after_update_step"),
        ("epochs", "after_update"), ("updates", "after_update"), ("updates", "periodic_callback"),
        ("epochs", "after_epoch"), ("updates", "after_epoch"), ("epochs", "periodic_callback"),
    ]  # fmt: skip


def test_what_is_not_implemented_is_not_called(maker):
    class Quiet(CallbackBase):
        def _after_update(self, update_counter):
            """Do nothing."""

    run = maker.run({"quiet": (Quiet, {}), "base": (CallbackBase, {})})
    assert {hook: run.hooks.methods(hook) for hook in HOOKS if run.hooks.methods(hook)} == {
        "after_update": [run.hooks.callbacks["quiet"].after_update]
    }


def test_hooks_run_without_gradients(maker):
    class Grad(CallbackBase):
        def _before_every_backward(self, update_counter, losses):
            assert losses["total"].requires_grad
            assert not (losses["total"] * 2).requires_grad

        def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
            assert not losses["total"].requires_grad

    train(maker.run({"grad": (Grad, {})}))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("hook", ["after_update", "after_log"])
def test_stopping_lets_the_others_fire_and_ends_after_the_update(maker, hook):
    class Log(CallbackBase):
        def _after_update(self, update_counter):
            self.writer.add_scalar("x", 1.0)

    diary = []
    callbacks = {
        "log": (Log, {}),
        "stop": (Stopper, {"hook": hook, "update": 4}),
        "d": (Diary, {"diary": diary, "every_n_updates": 1}),
    }
    run = maker.run(callbacks)
    train(run)
    assert diary[-2:] == [("d", "after_log", 4), ("d", "after_training", 4)]
    assert ("d", "after_update", 4) in diary and ("d", "periodic_callback", 4) in diary
    found = read_newest(maker.paths())
    assert found.progress.update == 4
    assert found.state["trainer"]["counter"]["stopped"]


def test_stopping_before_training(maker):
    run = maker.run({"stop": (Stopper, {"hook": "before_training", "update": 0})})
    train(run)
    assert run.counter.update == 0


def test_evaluations_are_announced_in_the_order_in_which_they_fire(maker, monkeypatch):
    class Notes(DatasetCallback):
        def _process_batch(self, batch, models): ...
        def _process_results(self, update_counter): ...

    class Further(Notes):
        """Reads a second dataset."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.also_read("train", max_batches=1)

    class Writes(PeriodicCallback):
        """May write to the model."""

    callbacks = {
        "a": (Notes, {"dataset_key": "test", "every_n_epochs": 1, "every_n_updates": 4}),
        "b": (Notes, {"dataset_key": "train", "every_n_updates": 3}),
        "same": (Notes, {"dataset_key": "test", "every_n_epochs": 2, "max_batches": 1}),
        "further": (Further, {"dataset_key": "test", "every_n_epochs": 2}),
        "smaller": (Notes, {"dataset_key": "test", "every_n_epochs": 2, "batch_size": 5}),
        "writes": (Writes, {"every_n_updates": 4}),
        "c": (Notes, {"dataset_key": "train", "every_n_epochs": 2, "at_start": True}),
        "d": (Notes, {"dataset_key": "test", "at_start": True}),
    }
    run = maker.run(callbacks, max_updates=10)
    order = CheckedOrder(Shuffled(dataset=range(20), seed=3))
    plan = BatchPlan({"train": 20, "test": 7}, "train", order, run.counter.at(0), run.hooks.evaluations(), 99)
    announced, update, fired = [], 0, []
    for request in plan:
        update += request.epoch != EVALUATION
        if request.epoch == EVALUATION and request.batch == 0:
            announced.append((update, request.dataset_key))
    read = run.data.evaluation_batches
    monkeypatch.setattr(
        run.data,
        "evaluation_batches",
        lambda key, size, *more: fired.append((run.counter.update, key, size or 7)) or read(key, size, *more),
    )
    train(run)
    assert [(update, key) for update, key, _ in fired] == announced
    assert fired[:2] == [(0, "train", 7), (0, "test", 7)]
    # What is due by the epoch comes last; "a", "same" and "further" share a pass, "smaller" has other batches.
    assert [key[1:] for key in fired if key[0] == 6] == [
        *(("train", 7), ("test", 7), ("train", 7), ("test", 5), ("train", 7))
    ]
    assert [key for key in fired if key[0] == 4] == [(4, "test", 7)]


def test_states_go_by_name(maker):
    train(maker.run({"a": (Stateful, {"value": 1}), "b": (Stateful, {"value": 2}), "none": (CallbackBase, {})}))
    assert read_newest(maker.paths()).state["callbacks"] == {"a": {"value": 1}, "b": {"value": 2}}
    hooks = maker.run({"b": (Stateful, {}), "new": (CallbackBase, {}), "a": (Stateful, {})}, resume=True).hooks
    assert [getattr(item, "value", None) for item in hooks.callbacks.values()] == [2, None, 1]
    assert hooks.callbacks["a"].paths.checkpoint_dir.is_dir()


def test_names_that_do_not_match_are_an_error_that_lists_both(maker):
    train(maker.run({"a": (Stateful, {}), "old": (Stateful, {})}))
    with pytest.raises(ResumeError) as info:
        maker.run({"a": (Stateful, {}), "new": (Stateful, {})}, resume=True)
    assert "new is new, old is missing" in str(info.value)
    assert "resume_strict=false" in str(info.value)


def test_names_need_not_match_if_that_is_allowed(maker):
    train(maker.run({"a": (Stateful, {"value": 1}), "old": (Stateful, {"value": 2})}))
    found = read_newest(maker.paths())
    run = maker.run({"a": (Stateful, {}), "new": (Stateful, {"value": 3})})
    for allowed in ({"may_lack": True}, {"may_have_more": True}):
        with pytest.raises(ResumeError):
            run.hooks.states.resume(found, run.trainer.model, **allowed)
    run.hooks.states.resume(found, run.trainer.model, may_lack=True, may_have_more=True)
    a, new = run.hooks.callbacks.values()
    assert (a.value, new.value) == (1, 3)
    assert a.paths is not None and new.paths is None, "the checkpoint has no files for a callback that is new"


def test_every_callback_is_closed_also_if_one_fails(maker):
    class Terminal(CallbackBase):
        is_open = True

        def close(self):
            self.is_open = False
            if self.name == "a":
                raise OSError("a disk has failed")

    hooks = maker.run({"a": (Terminal, {}), "b": (Terminal, {})}).hooks
    with pytest.raises(OSError, match="a disk has failed"):
        hooks.close()
    assert not any(item.is_open for item in hooks.callbacks.values())


class Steps(CallbackBase):
    """Notes the number of each accumulation step and how many there are, and the norm of the gradients at the end."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps, self.norms = [], []

    def _before_every_accumulation_step(self, update_counter, batch):
        self.steps.append(("before", update_counter.accumulation_step, update_counter.accumulation_steps))

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        self.steps.append(("after", update_counter.accumulation_step, update_counter.accumulation_steps))

    def _before_every_optimizer_step(self, update_counter):
        gradients = [parameter.grad.flatten() for parameter in self.model.parameters()]
        self.norms.append(torch.cat(gradients).norm())
        self.writer.add_scalar("norm", self.norms[-1])


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_hook_before_the_step_sees_the_gradients_before_clipping(maker, bits, precision):
    options = {"max_updates": 3, "precision": precision, "clip_norm": 0.1}
    plain = maker.run({}, run_id="plain", **options)
    train(plain)
    run = maker.run({"steps": (Steps, {})}, **options)
    train(run)
    norms = run.hooks.callbacks["steps"].norms
    assert len(norms) == 3 and torch.allclose(norms[-1], run.trainer.grad_norm)
    assert min(norms) > 0.1
    assert run.log_writer.summary["norm"].last_step == 3, "it belongs to the update that is being computed"
    assert bits(run.trainer.model.tensors()) == bits(plain.trainer.model.tensors())


def test_accumulation_steps_have_a_number_and_a_count(maker):
    run = maker.run({"steps": (Steps, {})}, batch_size=9, drop_last=False, accumulation_steps=3, max_epochs=1)
    train(run)  # batches of 9, 9 and 2 samples
    assert run.hooks.callbacks["steps"].steps == [
        (hook, step, 3) for steps in ((0, 1, 2), (0, 1, 2), (1, 2)) for step in steps for hook in ("before", "after")
    ]
