"""Streams are read from any position, with any number of workers, and give the same batches."""

import logging
import random
from functools import partial
from itertools import chain, islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from callbacks.loss import Loss
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.counter import Interval
from ksuit_runner.data.batch_plan import Evaluation
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.iterable_source import is_map_style
from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.testing import tiny_run
from ksuit_runner.trainer.sgd import SgdTrainer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on machines with a single core


def noise():
    return float(torch.rand(()) + np.random.random() + random.random())


class Plain(IterableDataset):
    """Five samples with noise, shuffled by what is drawn when an iteration begins, or before."""

    input_shape = (2,)

    def __iter__(self):
        order = list(range(5))
        random.shuffle(order)
        return self.shuffled(order)

    def shuffled(self, order):
        random.shuffle(order)
        for number in order:
            yield torch.tensor([number, noise()]), get_worker_info() is not None


class Stateful(IterableDataset):
    """Counts, and draws from a generator of its own."""

    def __init__(self):
        self.position, self.generator = 0, torch.Generator().manual_seed(1)

    def __iter__(self):
        samples = self.samples()
        return chain(list(islice(samples, 1)), samples)  # the first one ahead of time, as torchdata's loader does

    def samples(self):
        while self.position < 7:
            self.position += 1
            yield torch.tensor([self.position, float(torch.rand((), generator=self.generator))]) + noise()
        self.position = 0

    def state_dict(self):
        return {"position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.position = state["position"]
        self.generator.set_state(state["generator"])


class Seekable:
    """An endless stream that is read from anywhere."""

    def iterate(self, position):
        while True:
            yield torch.tensor([position % 11, noise()])
            position += 1


KINDS = {"plain": Plain, "stateful": Stateful, "seekable": Seekable}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def make(kind, num_workers=0, **kwargs):
    datasets = {"train": KINDS[kind](), "test": Plain(), "map": list(range(5))}
    return DataContainer(datasets, **{"batch_size": 3, "seed": 2, "num_workers": num_workers} | kwargs)


def listed(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else [part.tolist() for part in batch]


def read(data, start, stop, state=None, **kwargs):
    """Return the batches of some updates, and the state after the last one."""
    counter = data.new_counter(max_updates=20, **kwargs)
    counter.update = start
    if state is not None:
        data.load_state_dict(state, start)
    evaluations = [Evaluation(Interval(every_n_updates=2), key) for key in ("map", "test")]
    data.open(counter, evaluations)
    batches = []
    for update in range(start + 1, stop + 1):
        batches.append(data.next_training_batch()[0].batch)
        if update % 2 == 0:
            assert [listed(batch) for batch in data.evaluation_batches("map")] == [[0, 1, 2], [3, 4]]
            assert [len(batch[0]) for batch in data.evaluation_batches("test")] == [3, 2]
    state = data.state_dict(stop)
    data.close()
    return batches, state


def inputs(batches):
    return [listed(batch[0] if isinstance(batch, list | tuple) else batch) for batch in batches]


@EVERY_KIND
@pytest.mark.parametrize("samples_per_epoch", [None, 13])
def test_a_stream_is_the_same_with_any_number_of_workers_and_from_any_update(kind, samples_per_epoch):
    data = partial(make, kind, samples_per_epoch=samples_per_epoch)
    whole, _ = read(data(), 0, 8)
    assert len({str(batch) for batch in inputs(whole)}) == 8
    _, state = read(data(), 0, 3)
    assert bool(state) == (kind == "stateful")
    for num_workers in (0, 1, 2):
        resumed, _ = read(data(num_workers), 3, 8, state)
        assert inputs(resumed) == inputs(whole)[3:]
        if kind == "plain":
            assert all(in_worker.all() == (num_workers > 0) for _, in_worker in resumed)
    assert read(data(2), 0, 3)[1].keys() == state.keys()


def test_the_state_of_the_update_before_is_kept_for_an_update_that_fails():
    data = make("stateful")
    counter = data.new_counter(max_updates=5)
    data.open(counter)
    for _ in range(3):
        data.next_training_batch()
    assert [data.state_dict(update)["stream"]["state"]["position"] for update in (2, 3)] == [6, 2]
    assert data.state_dict(1) == {}


def test_evaluating_a_stream_reads_all_of_it_each_time_the_same():
    data = make("seekable", eval_batch_size=2)
    first, second = ([listed(batch) for batch in data.evaluation_batches("test")] for _ in range(2))
    assert first == second and [len(batch[0]) for batch in first] == [2, 2, 1]
    assert data.samples_in(None) is None
    with pytest.raises(ConfigError, match="data.datasets.train: training reads this stream"):
        make("seekable").evaluation_batches("train")
    assert len(list(make("seekable").evaluation_batches("train", max_batches=3))) == 3


def test_an_evaluation_neither_moves_the_training_stream_on_nor_vanishes():
    stream, once = Plain(), (sample for sample in Plain())
    data = DataContainer({"train": stream, "test": stream, "once": once}, 2, seed=3)
    with pytest.raises(ConfigError, match="data.datasets.test: training reads this stream"):
        data.evaluation_batches("test", max_batches=1)
    assert list(data.evaluation_batches("once"))
    with pytest.raises(KsuitError, match="data.datasets.once: a generator has no samples"):
        list(data.evaluation_batches("once"))


def test_the_length_of_a_run_on_a_stream():
    data = make("plain")
    assert data.new_counter(max_samples=10).end_update == 4
    with pytest.raises(ConfigError, match=r"trainer.max_epochs: .* has no epochs. Say .* data.samples_per_epoch, or"):
        data.new_counter(max_epochs=2)
    counter = make("plain", samples_per_epoch=13).new_counter(max_epochs=2)
    assert (counter.end_update, counter.samples_per_epoch) == (8, 12)
    with pytest.raises(ConfigError, match="data.batch_size: 3 is more than the 2 samples of an epoch"):
        make("plain", samples_per_epoch=2)


def test_the_shape_comes_from_the_dataset_or_a_sample_that_is_not_lost():
    assert make("plain").input_shape == make("seekable").input_shape == (2,)
    with pytest.raises(ConfigError, match="without moving it on, so it needs an attribute 'input_shape'"):
        _ = make("stateful").input_shape
    assert [info["size"] for info in make("plain").describe().values()] == [None, None, 5]


class Wrong(Seekable):
    def iterate(self, position):
        return super().iterate(2 * position)


class Short:
    def iterate(self, position):
        yield from range(position, 4)


def test_what_is_not_exact_or_slow_is_said_at_the_start(caplog):
    caplog.set_level(logging.INFO)
    for kind, message in (
        ("plain", "a Plain cannot be read from its middle"),
        ("stateful", "one worker reads it"),
        ("seekable", ""),
    ):
        make(kind, num_workers=2).check_repeatable()
        assert message in caplog.text
        assert message or not caplog.text
        caplog.clear()
    DataContainer({"train": Wrong()}, 3, seed=0).check_repeatable()
    assert "Wrong.iterate(1) does not begin with the second sample" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Short(), r"data.datasets.train: Short.iterate\(3\) has ended after 1 samples"),
        (iter(range(4)), "data.datasets.train: range_iterator has ended after 4 samples, and has no more"),
    ],
)
def test_a_stream_that_ends_for_good_is_an_error(dataset, message):
    data = DataContainer({"train": dataset}, 3, seed=0)
    data.open(data.new_counter(max_updates=5))
    data.next_training_batch()
    with pytest.raises(KsuitError, match=message):
        data.next_training_batch()


class Proxy:
    """Stands for another object, as those of wrapt do."""

    def __init__(self, wrapped):
        self._wrapped = wrapped

    def __getattr__(self, name):
        return getattr(self._wrapped, name)

    def __len__(self):
        return len(self._wrapped)

    def __getitem__(self, index):
        return self._wrapped[index]

    @property
    def __class__(self):
        return type(self._wrapped)


class Long(IterableDataset):
    """A stream that knows its length."""

    def __len__(self):
        return 9

    def __iter__(self):
        return iter(range(9))


@pytest.mark.parametrize("dataset", [Long(), Proxy(Long())])
def test_a_stream_of_known_length_is_a_stream(dataset):
    assert not is_map_style(dataset) and is_map_style(range(9)) and is_map_style(Proxy(range(9)))


def test_a_stream_has_an_order_of_its_own():
    with pytest.raises(ConfigError, match="data.order: the training dataset is a stream"):
        make("plain", order=dict)
    with pytest.raises(ConfigError, match="data.datasets.x: object is not a dataset"):
        DataContainer({"train": [1], "x": object()}, 1, seed=0)


class Pairs(SgdTrainer):
    """Splits the numbers of a stream into an input and a target."""

    def inputs_and_targets(self, batch):
        batch = batch[0] if isinstance(batch, list | tuple) else batch
        return batch[:, :1], batch[:, 1:]


class FailsAt(nn.Module):
    update = None

    def forward(self, x):
        if self.training and x.shape[0] == 3 and FailsAt.update is not None:
            FailsAt.update -= 1
            if FailsAt.update < 0:
                raise ZeroDivisionError("as if")
        return x


@EVERY_KIND
def test_a_run_on_a_stream_resumes_from_a_stop_and_from_a_failure(kind, tmp_path, monkeypatch):
    def run(name, **kwargs):
        torch.manual_seed(0)
        module = nn.Sequential(FailsAt(), nn.Linear(1, 1))
        given = {"trainer_class": Pairs, "module": module, "loss": nn.MSELoss(), "batch_size": 3, "max_updates": 8}
        datasets = {"train": KINDS[kind](), "test": Plain()}
        callbacks = {"loss": partial(Loss, dataset_key="test", every_n_updates=4)}
        return tiny_run(tmp_path, callbacks, name, datasets=datasets, **given, **kwargs)

    whole = run("whole").train()
    run("stopped", stop_at=3).train()
    failing = run("failed")
    monkeypatch.setattr(FailsAt, "update", 5)
    with pytest.raises(ZeroDivisionError):
        failing.train()
    monkeypatch.setattr(FailsAt, "update", None)
    assert read_newest(failing.paths).progress.update == 5
    for name in ("stopped", "failed"):
        resumed = run(name).train()
        assert all(torch.equal(resumed.weights[key], weight) for key, weight in whole.weights.items())
        assert resumed.metric("loss/test") == whole.metric("loss/test")


def test_what_counts_in_epochs_needs_epochs(tmp_path):
    def run(**kwargs):
        datasets = {"train": Plain(), "test": Plain()}
        given = {"trainer_class": Pairs, "module": nn.Linear(1, 1), "loss": nn.MSELoss(), "max_updates": 2}
        callbacks = {"loss": partial(Loss, dataset_key="test", **kwargs.pop("every", {"every_n_updates": 1}))}
        return tiny_run(tmp_path, callbacks, datasets=datasets, batch_size=3, **given, **kwargs)

    with pytest.raises(ConfigError, match=r"^callbacks.loss.every_n_epochs: .*or use every_n_updates"):
        run(every={"every_n_epochs": 1})
    with pytest.raises(ConfigError, match=r"^checkpoint.every_n_epochs: .*or use every_n_updates"):
        run(checkpoint={"every_n_epochs": 1})
