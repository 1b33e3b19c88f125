"""The states of callbacks on several ranks: stored once if they agree, else for each rank, and merged for others."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch
from worlds import in_threads

from callbacks.output_statistics import OutputStatistics
from callbacks.train_loss import TrainLoss
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.exchange import digest
from ksuit_runner.checkpoint.format import LOCAL, Checkpoint, read_newest
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.loop import train
from ksuit_runner.engine.restore import restore
from ksuit_runner.engine.run import _content
from ksuit_runner.errors import ResumeError
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.sgd import SgdTrainer
from ksuit_runner.trainer.sums import PartSums, Sums


class Held(CallbackBase):
    """Holds a state that a test sets."""

    state = None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        self.state = state_dict


class Merged(Held):
    def merge_state_dicts(self, state_dicts):
        return dict(sum((Counter(state) for state in state_dicts), Counter()))


@pytest.fixture
def held(maker):
    """A checkpoint, and a function that makes the states of callbacks of some classes."""

    def make(world=None, **callbacks):
        given = {name: kind if isinstance(kind, tuple) else (kind, {}) for name, kind in callbacks.items()}
        world = world or World()
        run = maker.run(given, run_id=f"{world.rank}-{world.size}", accumulation_steps=4, world=world)
        return run.hooks.states, run.hooks.callbacks

    train(maker.run({}, max_updates=1))
    return make, read_newest(maker.paths())


def resumed(states, callbacks, checkpoint, world, **options):
    states.resume(checkpoint, None, world=world, **options)
    return {name: item.state for name, item in callbacks.items()}


def stored(checkpoint, common, local=()) -> Checkpoint:
    return replace(checkpoint, state={**checkpoint.state, "callbacks": common}, local=tuple(local))


def test_states_that_agree_are_stored_once_and_others_for_each_rank(held):
    make, checkpoint = held
    kinds = {"a": Held, "b": Held, "c": Merged, "d": Held}

    def on_rank(world):
        states, callbacks = make(world, **kinds)
        nan = torch.tensor([0.0, torch.nan])
        callbacks["a"].state = {"same": [1, nan], "number": 2.0}
        callbacks["b"].state = {"tensor": torch.full((2,), world.rank, dtype=torch.bfloat16)}
        callbacks["c"].state = {"n": world.rank + 1}
        return states.divide(states.state_dict(), world)

    (common, first), (other, second) = in_threads(2, on_rank)
    assert list(common) == list(other) == ["a", "d"] and common["d"] is None
    assert [list(each) for each in (first, second)] == [["b", "c"]] * 2
    found = stored(checkpoint, common, [first, second])
    for rank in range(2):
        world = World()
        world.rank, world.size = rank, 2
        loaded = resumed(*make(world, **kinds), found, world)
        assert loaded["c"] == {"n": rank + 1} and loaded["b"]["tensor"].tolist() == [rank, rank]
    with pytest.raises(ResumeError, match=r"callbacks\.b.* 2 ranks .*a Held has no merge_state_dicts.*ranks=2"):
        resumed(*make(**kinds), found, World())
    loaded = resumed(*make(**kinds), found, World(), may_lack=True)
    assert loaded["b"] is None and loaded["c"] == {"n": 3} and loaded["a"]["number"] == 2.0
    with pytest.raises(ResumeError, match="b is missing"):
        resumed(*make(a=Held, c=Merged, d=Held), found, World())
    broken = stored(checkpoint, common, [{"b": None, "c": [1]}, {"b": None, "c": 2}, {"b": None, "c": 3}])
    with pytest.raises(ResumeError, match="another state than a Merged can load"):
        resumed(*make(a=Held, c=Merged, d=Held), broken, World(), may_have_more=True)


SUMS = {"loss": (TrainLoss, {"every_n_updates": 9}), "outputs": (OutputStatistics, {"every_n_updates": 9})}


def track(callbacks, parts, updates):
    """Let callbacks track parts of updates, with values whose sum depends on their order."""
    for update in updates:
        for part in parts:
            outputs = torch.randn(3, 2, generator=torch.Generator().manual_seed(9 * update + part)) * 10.0 ** (part % 3)
            losses = Losses(total=outputs.mean(), more=outputs.std())
            losses.counts, losses.factors = {"more": 0.1 * part + 1}, {}
            trainer = callbacks["outputs"].trainer
            trainer.counter.accumulation_step, trainer.part_weight = part, lambda batch: 3
            callbacks["outputs"]._track_after_accumulation_step(trainer.counter, None, losses, outputs)
            trainer.running_losses.note(part, losses, 3)
        trainer.running_losses.add()


def logged(callbacks):
    for item in callbacks.values():
        item._periodic_callback(item.trainer.counter)
    return callbacks["loss"].writer.flush()


def test_sums_of_parts_are_those_of_one_process_and_resume_on_any_number_of_ranks(held):
    make, checkpoint = held
    states, callbacks = make(**SUMS)
    track(callbacks, range(4), range(2))
    common, _ = states.divide(states.state_dict(), World())
    common = deepcopy(common)
    track(callbacks, range(4), range(2, 4))
    metrics = logged(callbacks)
    assert metrics.keys() == {
        "loss/train",
        "loss_more/train",
        *(f"outputs/output/{n}" for n in ("mean", "std", "abs_max")),
    }

    def begin(world):
        states, callbacks = make(world, **SUMS)
        track(callbacks, world.own(4), range(2))
        return states.divide(states.state_dict(), world)

    def go_on(world):
        states, callbacks = make(world, **SUMS)
        states.resume(stored(checkpoint, common), None, world=world)
        track(callbacks, world.own(4), range(2, 4))
        return logged(callbacks)

    for found, local in in_threads(2, begin):
        assert not local and digest("", found) == digest("", common)
    for size in (1, 2, 4):
        assert in_threads(size, go_on) == [metrics] * size


def test_sums_of_more_parts_than_there_are_now_are_not_lost():
    def on_rank(world):
        sums = PartSums(Sums, world, torch.device("cpu"))
        state = {"parts": {str(part): {"n": [2.0**part, 1]} for part in range(6)}}
        sums.load_state_dict(state, 2)
        return sums.take().totals["n"].sum

    assert in_threads(2, on_rank) == [63.0, 63.0]


class Carries(SgdTrainer):
    """Carries a state of its rank."""

    carried = 0

    def extra_state(self):
        return {"carried": self.carried}

    def load_extra_state(self, state):
        self.carried = state["carried"]


class Merges(Carries):
    def merge_extra_states(self, states):
        return {"carried": sum(state["carried"] for state in states)}


def test_what_a_trainer_carries_on_each_rank_is_its_own_after_a_resume(maker, held):
    _, checkpoint = held
    made = count()

    def begun(world, kind):
        return maker.run({}, run_id=f"run{next(made)}", trainer_class=kind, world=world, accumulation_steps=6)

    def saved(world, by=1):
        run = begun(world, Carries)
        run.trainer.carried = 1 + by * world.rank
        return _content(run)[1]

    def resumed(world, kind, states, strict=True):
        run = begun(world, kind)
        found = replace(checkpoint, state={**states[0], "unfinished": None}, local=[state[LOCAL] for state in states])
        restore(run, found, Origin(Mode.RESUME, "run"), strict)
        return run.trainer.carried

    assert not any(state[LOCAL] for state in in_threads(2, partial(saved, by=0)))
    states = in_threads(2, saved)
    assert in_threads(2, partial(resumed, kind=Carries, states=states)) == [1, 2]
    assert resumed(World(), Merges, states) == 3 and resumed(World(), Carries, states, strict=False) == 1
    assert in_threads(3, partial(resumed, kind=Merges, states=states)) == [3, 3, 3]
    with pytest.raises(ResumeError, match=r"2 ranks that have stored it, and a Carries has no merge_extra_states"):
        resumed(World(), Carries, states)
