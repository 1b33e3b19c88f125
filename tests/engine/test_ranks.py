"""Runs of two ranks: what they agree on, and how they end together. One pair of processes does them all."""

import os
import signal
import time
from functools import partial
from itertools import count

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.checkpoint.folders import read_tags
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.data import container
from ksuit_runner.data.container import DataContainer
from ksuit_runner.distributed.connect import connect
from ksuit_runner.distributed.ddp import DataParallel
from ksuit_runner.distributed.fsdp import ShardedParallel
from ksuit_runner.distributed.world import World
from ksuit_runner.engine import runner
from ksuit_runner.engine.assembly import build_run
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError, PeerError, StopTraining
from ksuit_runner.keyed_random import keyed
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import JournalReader
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.schedule import constant
from ksuit_runner.system.signals import Interruption, catch_signals
from ksuit_runner.testing import build_callbacks
from ksuit_runner.trainer.sgd import SgdTrainer

RANKS, UPDATES = 2, 6


class Points:
    """Points with noise, as if drawn from an augmentation; ``on_fetch`` is called before the fetch of a sample."""

    def __init__(self, on_fetch=lambda: None):
        self.on_fetch = on_fetch

    def __len__(self):
        return 48

    def __getitem__(self, index):
        self.on_fetch()
        return torch.arange(4.0) * (index % 3) + 0.1 * torch.rand(4), torch.tensor(index % 3)


class Trainer(SgdTrainer):
    """Calls ``self.at(update, part)`` before each training step."""

    at = staticmethod(lambda update, part: None)

    def training_step(self, batch, model):
        if model.training:
            self.at(self.counter.update + 1, self.counter.accumulation_step)
        return super().training_step(batch, model)


class Act(CallbackBase):
    """Does what a scenario wants: ``act(callback, hook, update)``."""

    def __init__(self, act=None, **kwargs):
        super().__init__(**kwargs)
        self.act = act or (lambda *given: None)
        self.rank = self.data_container.world.rank

    def _before_every_update(self, update_counter):
        self.act(self, "before", update_counter.update + 1)

    def _after_update(self, update_counter):
        self.act(self, "after", update_counter.update)


class Count(CallbackBase):
    """Counts its calls, in its state, and logs the number."""

    calls = 0

    def _after_update(self, update_counter):
        self.calls += 1
        self.writer.add_scalar(f"calls/{self.name}", self.calls)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state_dict):
        self.calls = state_dict["calls"]


class Seen(CallbackBase):
    """Remembers what ``after_log`` got."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metrics = []

    def _after_log(self, update_counter, metrics):
        self.metrics.append((update_counter.update, dict(metrics)))


class Evaluate(DatasetCallback):
    """Knows nothing of ranks: each of them evaluates everything."""

    def __init__(self, act=lambda number: None, **kwargs):
        super().__init__(dataset_key="test", **kwargs)
        self.act, self.total, self.batches = act, 0.0, 0

    def _process_batch(self, batch, models):
        self.batches += 1
        self.act(self.batches)
        self.total += self.trainer.forward(batch)[0]["total"].item()

    def _process_results(self, update_counter):
        self.writer.add_scalar("loss/test", self.total)
        self.total, self.batches = 0.0, 0


def nothing(*given):
    pass


def build(
    folder,
    world,
    name,
    act=None,
    step=None,
    evaluate=nothing,
    on_fetch=nothing,
    resume=False,
    strategy=DataParallel,
    interruption=None,
):
    """Build a run that does in its training steps, evaluations and so on what a scenario wants."""
    datasets = {"train": Points(on_fetch), "test": Points()}
    data = DataContainer(
        datasets, batch_size=8, seed=3, eval_batch_size=16, world=world, interruption=interruption or Interruption()
    )
    with keyed(3, "model"):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    trainer = Trainer(
        ModelBase(model),
        data,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        schedule=constant,
        loss=nn.CrossEntropyLoss(),
        max_updates=UPDATES,
        accumulation_steps=RANKS,
        strategy=strategy(world),
    )
    trainer.at = step or trainer.at
    callbacks = {
        "first": Count,
        "act": partial(Act, act=act),
        "second": Count,
        "evaluate": partial(Evaluate, act=evaluate, every_n_updates=3, at_end=False),
        "seen": Seen,
    }
    paths = PathProvider(folder, name)
    return build_run(
        trainer,
        paths,
        partial(build_callbacks, callbacks, seed=3),
        seed=3,
        checkpoint_writer=CheckpointWriter(paths, world=world),
        checkpoint=read_newest(paths, world=world) if resume else None,
    )


def execute(run):
    """Train, and return how that ended on this rank, as plain values."""
    error = None
    try:
        train(run)
    except BaseException as caught:
        error = caught
    run.checkpoint_writer.close()
    run.data.close()
    reported = run.meeting.settle(error)
    return {
        "error": None if error is None else type(error).__name__,
        "reported": None if reported is None else str(reported),
        "is_silent": getattr(reported, "is_reported", False),
        "signal": run.interruption.signal,
        "update": run.counter.update,
        "seen": run.hooks.callbacks["seen"].metrics,
        "weights": [value.tolist() for value in run.trainer.model.module.buffers()]
        + [gather_full(value.detach()).tolist() for value in run.trainer.model.module.parameters()],
    }


def gather_full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


# Scenarios: what happens on rank 1 only


def log_differently(self, hook, update):
    if hook == "before" and update == 2 and self.rank == 1:
        self.writer.add_scalar("before/only", 5.0)
    if hook == "after":
        self.writer.add_scalar("rank", float(self.rank))
        self.writer.add_scalar("nan", float("nan"))
        if self.rank == 1 and update == 4:
            self.writer.add_scalar("only", 7.0)
            self.checkpoint_writer.request("asked")


def on_rank_1(what, at, hook="after"):
    def act(self, now, update):
        if self.rank == 1 and (now, update) == (hook, at):
            what()

    return act


def fail():
    raise ValueError("of rank 1 only")


def stop():
    raise StopTraining("of rank 1 only")


def interrupt():
    signal.raise_signal(signal.SIGTERM)


def in_step(rank, what, update):
    return lambda now, part: what() if (rank, now) == (1, update) else None


def in_batch(rank, what, number):
    return lambda now: what() if (rank, now) == (1, number) else None


def slow_fetch(rank, update, then_s):
    """Return what is called for each sample of training, and has the 4th batch interrupted."""
    calls = count(1)

    def on_fetch():
        if (rank, next(calls)) == (1, (update - 1) * 4 + 2):
            interrupt()
            time.sleep(then_s)

    return on_fetch


def scenarios(rank):
    return {
        "log": {"act": log_differently},
        "stop": {"act": on_rank_1(stop, 4)},
        "stop before": {"act": on_rank_1(stop, 4, "before")},
        "fail in a step": {"step": in_step(rank, fail, 4)},
        "fail before": {"act": on_rank_1(fail, 4, "before")},
        "fail after": {"act": on_rank_1(fail, 4)},
        "fail in an evaluation": {"evaluate": in_batch(rank, fail, 2)},
        "fail sharded": {"step": in_step(rank, fail, 4), "strategy": ShardedParallel},
        "interrupt in a step": {"step": in_step(rank, interrupt, 4)},
        "interrupt after": {"act": on_rank_1(interrupt, 4)},
        "interrupt in an evaluation": {"evaluate": in_batch(rank, interrupt, 2)},
        "interrupt in a short wait": {"on_fetch": slow_fetch(rank, 4, 0.0)},
        "interrupt in a long wait": {"on_fetch": slow_fetch(rank, 4, 60.0)},
    }


def on_a_rank(folder):
    container._GRACE_S = 0.3
    world, found = connect({}), {}
    try:
        for name, given in scenarios(world.rank).items():
            with catch_signals() as interruption:
                run = build(folder, world, name.replace(" ", "-"), interruption=interruption, **given)
                found[name] = execute(run)
    finally:
        world.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ended(folder):
    """How each scenario has ended on each rank, by name."""
    ranks = on_ranks(RANKS, on_a_rank, folder)
    return {name: [found[name] for found in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def alone(folder):
    """The same run in a single process, with as many parts."""
    return execute(build(folder, World(), "alone"))


def paths_of(folder, name):
    return PathProvider(folder, name.replace(" ", "-"))


def metrics(folder, name):
    lines = JournalReader(paths_of(folder, name).journal).read()
    return [(point.key, point.step, repr(point.value)) for line, _ in lines for point in line]


def test_ranks_agree_on_what_they_log_and_see_the_same(ended, alone, folder):
    one, other = ended["log"]
    assert repr(one["seen"]) == repr(other["seen"])
    found = {(key, step): value for key, step, value in metrics(folder, "log")}
    assert {step: value for (key, step), value in found.items() if key == "rank"} == dict.fromkeys(range(1, 7), "0.5")
    assert found["only", 4] == "7.0" and found["before/only", 2] == "5.0" and found["nan", 3] == "nan"
    extra = {"rank", "only", "before/only", "nan"}
    assert [point for point in metrics(folder, "log") if point[0] not in extra] == metrics(folder, "alone")
    assert one["weights"] == other["weights"] == alone["weights"]
    assert "asked" in read_tags(PathProvider(folder, "log"))


def test_one_rank_stops_training_of_all(ended, alone, folder):
    for name in ("stop", "stop before"):
        assert [(each["update"], each["reported"]) for each in ended[name]] == [(4, None)] * RANKS
        paths = paths_of(folder, name)
        assert read_newest(paths).state["trainer"]["counter"]["stopped_by"] == ["act"]


BEFORE_EVALUATION = [f"{name}.after_update" for name in ("first", "act", "second")]
ENDS = {
    "fail in a step": (3, None, "raised in update 4"),
    "fail before": (3, None, "callback 'act', hook before_every_update"),
    "fail after": (4, ["first.after_update"], "callback 'act', hook after_update"),
    "fail in an evaluation": (3, BEFORE_EVALUATION, "callback 'evaluate'"),
    "interrupt in a step": (4, None, None),
    "interrupt after": (5, None, None),
    "interrupt in an evaluation": (3, BEFORE_EVALUATION, None),
    "interrupt in a short wait": (4, None, None),
    "interrupt in a long wait": (3, None, None),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_one_rank_ends_all_with_one_report_and_one_state(ended, alone, folder, name):
    update, done, where = ENDS[name]
    one, other = ended[name]
    assert one["update"] == other["update"] == update
    if where is None:
        assert [each["error"] for each in ended[name]] == [None, None]
        assert one["signal"] == other["signal"] == signal.SIGTERM
    else:
        assert (one["error"], other["error"]) == ("PeerError", "ValueError")
        assert one["reported"].startswith("rank 1: ValueError: of rank 1 only") and where in one["reported"]
        assert other["is_silent"]
    unfinished = read_newest(paths_of(folder, name)).state["unfinished"]
    assert (unfinished and unfinished["done"]) == done
    if name == "fail after":  # what rank 0 has logged since is logged again
        assert unfinished["log"].keys() == {"calls/first"}
    resumed = execute(build(folder, World(), name.replace(" ", "-"), resume=True))
    assert resumed["weights"] == alone["weights"]
    assert sorted(metrics(folder, name)) == sorted(metrics(folder, "alone"))


def test_what_is_spread_over_the_ranks_is_saved_as_well(ended, alone, folder):
    one, other = ended["fail sharded"]
    assert (one["error"], other["error"]) == ("PeerError", "ValueError") and other["is_silent"]
    assert str(read_newest(paths_of(folder, "fail sharded")).progress) == "E0_U3_S24"
    resumed = execute(build(folder, World(), "fail-sharded", resume=True))
    for found, expected in zip(resumed["weights"], alone["weights"], strict=True):
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-6)


def begin_a_run(folder):
    """Begin a run that only rank 0 can build, and return what it raises."""
    config = check_config(compose_config(["model=linear", "tracker=noop", "strategy=ddp", f"output_dir={folder}"]))
    if os.environ["RANK"] == "1":
        runner.build_trainer = partial(refuse, "trainer.device: it is not there")
    try:
        runner.run(config, Launch("a test", []))
    except PeerError as error:
        return str(error), error.exit_status, error.is_reported
    return None


def refuse(message, *given):
    raise ConfigError(message)


def test_what_one_rank_cannot_build_begins_nowhere(tmp_path):
    one, other = on_ranks(RANKS, begin_a_run, tmp_path)
    assert one == ("rank 1: trainer.device: it is not there", 2, False)
    assert other == ("trainer.device: it is not there", 2, True)
    assert not (tmp_path / "runs").exists()
