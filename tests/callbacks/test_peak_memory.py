from functools import partial

import psutil
import torch

from callbacks.peak_memory import PeakMemory


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
