import random

import numpy as np
import pytest
import torch

from ksuit_runner.keyed_random import keyed, mix, seed_all, seed_host


def draw():
    return torch.rand(()).item(), float(np.random.random()), random.random()


def test_a_key_is_the_same_in_every_process():
    assert mix(0, "update", 5, 0, 0) == 8183483952759217555


def test_the_low_bits_of_near_keys_differ():
    keys = {mix(seed, "update", update) & 0xFFFFFFFF for seed in range(20) for update in range(500)}
    assert len(keys) > 9_990  # of 10,000; a collision or two is chance


def test_parts_do_not_run_into_each_other():
    assert len({mix(1, 23), mix(12, 3), mix("1", 23), mix(123)}) == 4


def test_seeding_determines_every_generator():
    seed_all(mix(1))
    first = draw()
    draw()
    seed_all(mix(1))
    assert draw() == first
    seed_all(mix(2))
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_the_generators_of_the_host_can_be_seeded_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    seed_host(mix(1))
    first = random.random(), np.random.random()
    seed_host(mix(1))
    assert (random.random(), np.random.random()) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_a_keyed_block_gives_back_what_it_found():
    seed_all(7)
    expected = draw()
    seed_all(7)
    with keyed(0, "model"):
        inside = draw()
    assert draw() == expected
    with keyed(0, "model"):
        assert draw() == inside
    with keyed(0, "data"):
        assert draw() != inside


def test_a_keyed_block_gives_back_after_an_error():
    seed_all(7)
    expected = draw()
    seed_all(7)
    with pytest.raises(ZeroDivisionError), keyed(1):
        draw()
        _ = 1 / 0
    assert draw() == expected
