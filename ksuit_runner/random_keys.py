"""Keyed randomness: every random draw belongs to a position of the run, none to a stream.

Before an update the generators are seeded from (seed, update, accumulation step, rank), before a fetch from
(seed, dataset, epoch, batch). A position is a few integers, so nothing has to be replayed or stored to resume, and
what a callback draws is forgotten at the next update.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def mix(*parts: int | str) -> int:
    """Hash the parts to 63 well-mixed bits, so that also the low 32 (all that a CPU generator uses) differ."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(key: int) -> None:
    """Seed the generators of torch (CPU and the current accelerator), numpy and random."""
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(key)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(key)
    seed_host(key)


def seed_host(key: int) -> None:
    """Seed the generators that live in Python: numpy and random."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


@contextmanager
def keyed(*parts: int | str) -> Iterator[None]:
    """Run a block under a key of its own and give back the CPU generators as they were found."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_all(mix(*parts))
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
