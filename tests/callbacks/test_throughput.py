from functools import partial
from time import perf_counter

import pytest

from callbacks.throughput import Throughput


def test_rates_belong_to_one_time_that_is_part_of_the_whole(new_run):
    start = perf_counter()
    run = new_run({"throughput": partial(Throughput, every_n_updates=20)}, max_updates=60).train()
    seconds = perf_counter() - start
    updates, samples = run.metric("updates_per_second"), run.metric("samples_per_second")
    assert list(updates) == list(samples) == list(run.metric("data_wait_fraction")) == [20, 40, 60]
    for update, rate in updates.items():
        assert samples[update] / rate == pytest.approx(1438 / 20)  # samples per update of a whole epoch
    assert 0 < sum(20 / rate for rate in updates.values()) < seconds
    assert all(0 < fraction < 1 for fraction in run.metric("data_wait_fraction").values())


def test_after_a_resume_only_what_was_done_since_counts(new_run):
    throughput = {"throughput": partial(Throughput, every_n_updates=20)}
    new_run(throughput, stop_at=39).train()
    resumed = new_run(throughput, max_updates=40).train()
    ratio = resumed.metric("samples_per_second")[40] / resumed.metric("updates_per_second")[40]
    assert ratio == pytest.approx(70)  # the last batch of an epoch
