"""Seeds the generators for the steps of training."""

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.engine.host_mark import HostMark
from ksuit_runner.keyed_random import mix, seed_all, seed_host, seed_torch


class StepSeeds:
    """Seeds the generators before each accumulation step, so that what it draws depends on its position only.

    Seeding numpy and random takes longer than seeding torch, and next to no model draws from them. So they are given
    the same state before every update, until an update has drawn from them; from then on they are seeded for every
    update. The parts of a batch are always seeded, because ranks compute them in another order.

    An update has drawn if the state has changed. One that restores the state after it has drawn does not count, and
    finds the same numbers again in the next update.

    Args:
        seed: Seed of the run.
        counter: Position of the run.

    Attributes:
        draws_on_host: Whether an update has drawn from numpy or random. Belongs to the state of the run.
    """

    def __init__(self, seed: int, counter: UpdateCounter) -> None:
        self.draws_on_host = False
        self._has_drawn = False  # in this update
        self._seed, self._counter = seed, counter
        self._undrawn = HostMark()

    def seed(self, step: int) -> None:
        """Seed the generators for an accumulation step of the next update."""
        key = mix(self._seed, "update", self._counter.update, step)
        if self._is_per_update:
            seed_all(key)
            return
        seed_torch(key)
        if not self._undrawn.is_here():
            seed_host(mix(self._seed, "update"))
            self._undrawn.set()

    def note_draws(self) -> None:
        """Note whether something was drawn since; called before the batch is evaluated again, which is seeded anew."""
        if not self._is_per_update and not self._undrawn.is_here():
            self._has_drawn = True

    def seed_optimizer(self, evaluation: int = 0) -> None:
        """Seed the generators for an optimizer that draws: alike on all ranks, which have computed different parts.

        Args:
            evaluation: How many times the optimizer has had the batch evaluated again.
        """
        if self._counter.accumulation_steps > 1:
            seed_all(mix(self._seed, "optimizer", self._counter.update, evaluation))

    def end_update(self) -> None:
        """Note whether the update has drawn; called before anything else can draw."""
        self.note_draws()
        self.draws_on_host = self.draws_on_host or self._has_drawn

    @property
    def _is_per_update(self) -> bool:
        return self.draws_on_host or self._counter.accumulation_steps > 1
