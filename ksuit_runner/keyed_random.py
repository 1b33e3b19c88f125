"""Keyed randomness: every random draw belongs to a position of the run, none to a stream.

Before an update the generators are seeded from (seed, update, part of the batch), before a fetch from
(seed, dataset, epoch, batch), before a callback's hook from (seed, callback, hook, update). A position is a few
integers, so nothing has to be replayed to resume, and what a callback draws changes neither training nor what another
callback draws.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch


def mix(*parts: int | str) -> int:
    """Hash the parts to 63 well-mixed bits, so that also the low 32 (all that a CPU generator uses) differ."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(key: int) -> None:
    """Seed the generators of torch (CPU and the current accelerator), numpy and random."""
    seed_torch(key)
    seed_host(key)


def seed_torch(key: int) -> None:
    """Seed the generators of torch: that of the CPU and that of the current accelerator."""
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(key)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(key)


def seed_host(key: int) -> None:
    """Seed the generators that live in Python: numpy and random."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


Function = TypeVar("Function", bound=Callable[..., Any])


def uses_no_rng(function: Function) -> Function:
    """Mark a function that draws no random numbers: the generators are not seeded before it is called.

    It saves time in what is called at every update: a callback's hook, or a dataset's ``__getitems__`` that only
    indexes. A subclass that overrides the function has to mark its own.
    """
    function.uses_no_rng = True  # type: ignore[attr-defined]
    return function


def may_draw(function: Any) -> bool:
    """Whether a function is not marked with ``uses_no_rng``."""
    return not getattr(function, "uses_no_rng", False)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run a block, and restore the state of all generators after it; of several accelerators, of the current one."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    accelerator = torch.cuda if torch.cuda.is_initialized() else torch.mps  # type: ignore[no-untyped-call]
    has_accelerator = accelerator is torch.cuda or torch.backends.mps.is_available()
    accelerator_state = accelerator.get_rng_state() if has_accelerator else None
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if accelerator_state is not None:
            with suppress(RuntimeError):  # of a device that has failed: the block has its own error
                accelerator.set_rng_state(accelerator_state)


@contextmanager
def keyed(*parts: int | str) -> Iterator[None]:
    """Run a block under its own key, and restore the state of all generators after it."""
    with undisturbed():
        seed_all(mix(*parts))
        yield
