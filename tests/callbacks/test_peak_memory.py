from functools import partial

import psutil
import torch

from callbacks.peak_memory import PeakMemory
from ksuit_runner.distributed.world import World


def test_the_peak_covers_what_was_in_use_and_stays_until_the_next_run(new_run):
    callbacks = {"memory": partial(PeakMemory, every_n_updates=2)}
    before = psutil.Process().memory_info().rss / 1e9
    held = torch.ones(50_000_000)  # 0.2 GB
    first = new_run(callbacks, run_id="first", max_updates=4).train().metric("peak_memory_gb")
    assert list(first) == [2, 4]
    assert before + 0.9 * held.nbytes / 1e9 < first[2] <= first[4] < psutil.virtual_memory().total / 1e9
    del held
    later = new_run(callbacks, run_id="later", max_updates=2).train().metric("peak_memory_gb")
    assert later[2] < first[4] - 0.9 * 0.2


def test_of_several_ranks_the_largest_peak_counts(new_run, monkeypatch):
    class Peaks(World):
        def gather(self, value):
            return [1e9, value, 3e9]

    monkeypatch.setattr("callbacks.peak_memory.MemoryPeak.bytes", 2e9)
    run = new_run({"memory": partial(PeakMemory, every_n_updates=2)}, max_updates=2)
    run.run.data.world = Peaks()
    assert run.train().metric("peak_memory_gb") == {2: 3.0}
