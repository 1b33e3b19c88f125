"""There is no GPU where this is tested: what torch would ask CUDA for is recorded instead."""

from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch

from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import keyed
from ksuit_runner.tensors.device import MemoryPeak, choose_device, current_device


class Gpus:
    """A driver with some GPUs, of which only what the runner asks for exists."""

    def __init__(self, monkeypatch, count):
        self.current, self.set = 0, []
        self.generators = [torch.Generator() for _ in range(count)]
        empty = torch.empty

        def on_gpu(*sizes, device):
            if device == "cpu":
                return empty(*sizes)
            if (number := torch.device(device).index or self.current) >= count:
                raise RuntimeError("CUDA error: invalid device ordinal\nmore lines")
            return SimpleNamespace(device=torch.device("cuda", number))

        cuda = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: count,
            "current_device": lambda: self.current,
            "set_device": self.set_device,
            "default_generators": self.generators,
            "get_rng_state": lambda: self.generators[self.current].get_state(),
            "set_rng_state": lambda state: self.generators[self.current].set_state(state),
        }
        for name, stand_in in cuda.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch, "empty", on_gpu)

    def set_device(self, device):
        self.current = device if isinstance(device, int) else device.index
        self.set.append(self.current)

    def states(self):
        return [generator.get_state().tolist() for generator in self.generators]


@pytest.fixture
def gpus(monkeypatch):
    return partial(Gpus, monkeypatch)


def test_the_device_of_a_run_is_seeded_and_everything_is_as_before(gpus):
    """Else a run on the second GPU would not be exact, and disturb who has started it."""
    driver, before = gpus(3), []
    for number in (1, 2):
        before = driver.states()
        with current_device(choose_device(f"cuda:{number}")):
            with keyed(0, "model"):
                assert driver.states()[number] != before[number]
                assert driver.states()[0] == before[0]
            driver.generators[number].manual_seed(7)
        assert (driver.current, driver.states()) == (0, before)
    assert driver.set == [1, 0, 2, 0]


def test_what_a_failed_device_says_at_the_end_does_not_hide_why_the_run_failed(gpus, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpus(2)
    with pytest.raises(ZeroDivisionError), current_device(torch.device("cuda", 1)):
        monkeypatch.setattr(torch.cuda, "set_device", fail)
        monkeypatch.setattr(torch.cuda, "set_rng_state", fail)
        raise ZeroDivisionError


def test_without_a_gpu_nothing_is_asked_of_cuda(monkeypatch):
    """Its start takes a while."""
    for name in ("is_available", "current_device", "set_device", "device_count"):
        monkeypatch.delattr(torch.cuda, name)
    assert choose_device("cpu") == choose_device("cpu", local_rank=3) == torch.device("cpu")
    with current_device(torch.device("cpu")):
        pass


def test_a_device_that_is_not_there(gpus):
    with pytest.raises(ConfigError, match=r"trainer.device: 'cuda:1' is not available here \(.*\); 'auto' chooses"):
        choose_device("cuda:1")
    gpus(1)
    with pytest.raises(ConfigError, match=r"trainer.device: 'cuda:1' is not .*\(CUDA error: invalid device ordinal\);"):
        choose_device("cuda:1")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_every_rank_of_a_machine_has_its_own_gpu(gpus, name):
    gpus(2)
    assert [choose_device(name, local_rank).index for local_rank in (0, 1)] == [0, 1]
    with pytest.raises(ConfigError, match="rank 2 of this machine needs a GPU of its own, and there are 2"):
        choose_device(name, 2)
    with pytest.raises(ConfigError, match="'cuda:1' is one device, and every rank needs its own: write cuda"):
        choose_device("cuda:1", 1)
    gpus(1)
    assert choose_device(name, 5).index == 0, "the only one that this rank sees, as Slurm and MIG have it"


class Two(World):
    """A world of two ranks, of which the other says that it has this GPU."""

    size = 2

    def __init__(self, rank, other):
        self.rank = self.local_rank = rank
        self.other = other

    def gather(self, value):
        return [value, self.other(value)] if self.rank == 0 else [self.other(value), value]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_on_one_gpu_are_refused(gpus, monkeypatch, rank):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    with pytest.raises(ConfigError, match=r"trainer.device: the ranks 0, 1 would share a GPU"):
        Strategy(Two(rank, lambda gpu: gpu)).device("auto")
    for position in range(4):  # another machine, part of a GPU, GPU of the machine
        other = partial(_changed, position=position)
        assert Strategy(Two(rank, other)).device("auto").index == 0
    assert Strategy(Two(rank, lambda gpu: gpu)).device("cpu").type == "cpu"


def _changed(values, position):
    return [*values[:position], "another", *values[position + 1 :]]


def test_the_peak_of_memory_begins_anew():
    peak, held = MemoryPeak(torch.device("cpu")), torch.ones(50_000_000)  # 0.2 GB
    used, size = psutil.Process().memory_info().rss, held.nbytes
    assert (most := peak.bytes) > used - 0.01 * size > 0.9 * size
    del held
    assert peak.bytes == most
    anew = MemoryPeak(torch.device("cpu"))
    assert anew.bytes < most - 0.9 * size
    assert peak.bytes == pytest.approx(anew.bytes, abs=0.01 * size)  # the memory of an earlier time counts for neither
