"""The position of a run (epoch, update, sample), its end, and intervals."""

import re
from dataclasses import dataclass, replace
from itertools import islice
from math import gcd
from typing import Any

from ksuit_runner.config.types import check_numbers
from ksuit_runner.errors import ConfigError

_NUMBER = "(0|[1-9][0-9]{0,17})"
_MOST_UPDATES_CHECKED = 5000
_ENDLESS = 1 << 62
_NO_EPOCHS = (
    "the training data is a stream of unknown length, which has no epochs. "
    "Say how many samples count as one by data.samples_per_epoch"
)
_PROGRESS = re.compile(f"E{_NUMBER}_U{_NUMBER}_S{_NUMBER}")


@dataclass(frozen=True)
class Progress:
    """A position of a run: completed epochs, completed updates, samples seen."""

    epoch: int
    update: int
    sample: int

    def __str__(self) -> str:
        return f"E{self.epoch}_U{self.update}_S{self.sample}"

    @classmethod
    def parse(cls, text: str) -> "Progress | None":
        """Parse the text form of a position, ``E2_U90_S2880``; None if the text is not one."""
        match = _PROGRESS.fullmatch(text)
        return cls(*map(int, match.groups())) if match else None


class UpdateCounter:
    """Counts updates; epochs and samples follow from them.

    Args:
        dataset_size: Number of samples in the training dataset; None if it is unknown, and the run a single epoch that
            is never complete.
        batch_size: Samples per update, over all ranks and accumulation steps.
        drop_last: Whether an epoch's last, smaller batch is skipped.
        max_epochs: End after this many epochs.
        max_updates: End after this many updates.
        max_samples: End with the first update that reaches this many samples. Where several ends are given, the first
            one that is reached counts.

    Attributes:
        update: Number of completed updates.
        updates_per_epoch: Number of updates in an epoch.
        samples_per_epoch: Number of samples that training sees in an epoch.
        has_epochs: Whether the run has epochs: not if the size of the dataset is unknown.
        end_update: Number of updates after which the run ends.
        accumulation_step: Number, from 0, of the part of the batch that this rank is computing.
        accumulation_steps: Number of parts of a batch; a batch with fewer samples than that has fewer parts.
        stopped: Whether a callback has ended training.
        stopped_by: Names of the callbacks that have ended it.

    Raises:
        ConfigError: No end is given, or a negative one; the dataset does not fill a single batch; or an end in epochs
            is given for a dataset of unknown size.
    """

    def __init__(
        self,
        dataset_size: int | None,
        batch_size: int,
        drop_last: bool = True,
        max_epochs: int | None = None,
        max_updates: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.has_epochs = dataset_size is not None
        dataset_size = _ENDLESS * batch_size if dataset_size is None else dataset_size
        self.updates_per_epoch = dataset_size // batch_size if drop_last else -(-dataset_size // batch_size)
        if self.updates_per_epoch == 0:
            raise ConfigError(f"{batch_size} is more than the {dataset_size} training samples", path="data.batch_size")
        self.samples_per_epoch = self.updates_per_epoch * batch_size if drop_last else dataset_size
        self.update = 0
        self.accumulation_step, self.accumulation_steps = 0, 1
        self.end_update = self._end(max_epochs, max_updates, max_samples)
        self.stopped = False
        self.stopped_by: list[str] = []

    def stop(self, name: str) -> None:
        """End training after the current update, at the request of the callback of this name."""
        self.stopped_by = [*self.stopped_by, name] if self.stopped else [name]
        self.stopped = True

    def _end(self, max_epochs: int | None, max_updates: int | None, max_samples: int | None) -> int:
        ends_at = {"max_epochs": max_epochs, "max_updates": max_updates, "max_samples": max_samples}
        check_numbers("NonNegativeInt", "trainer", **ends_at)
        if max_epochs and not self.has_epochs:
            raise ConfigError(f"{_NO_EPOCHS}, or end by max_updates or max_samples", path="trainer.max_epochs")
        ends = [max_updates] if max_updates is not None else []
        if max_epochs is not None:
            ends.append(max_epochs * self.updates_per_epoch)
        if max_samples is not None:
            ends.append(self.update_at(max_samples))
        if not ends:
            raise ConfigError("one of max_epochs, max_updates, max_samples is needed", path="trainer")
        return min(ends)

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self.update // self.updates_per_epoch

    @property
    def sample(self) -> int:
        """Number of samples seen."""
        return self.sample_at(self.update)

    @property
    def is_full_epoch(self) -> bool:
        """Whether the last update completed an epoch."""
        return self.update > 0 and self.update % self.updates_per_epoch == 0

    @property
    def is_finished(self) -> bool:
        """Whether no update is left."""
        return self.stopped or self.update >= self.end_update

    @property
    def is_empty(self) -> bool:
        """Whether the run has no updates: it only evaluates."""
        return self.update == self.end_update == 0

    @property
    def progress(self) -> Progress:
        """The current position."""
        return Progress(self.epoch, self.update, self.sample)

    def sample_at(self, update: int) -> int:
        """Number of samples seen after the given number of updates."""
        epochs, rest = divmod(update, self.updates_per_epoch)
        return epochs * self.samples_per_epoch + rest * self.batch_size

    def update_at(self, sample: int) -> int:
        """Number of updates after which the given number of samples have been seen, or some more."""
        epochs, rest = divmod(sample, self.samples_per_epoch)
        return epochs * self.updates_per_epoch + -(-rest // self.batch_size)

    def at(self, update: int) -> "UpdateCounter":
        """Return the same counter at another update, to look ahead."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, update=update)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return the position; epoch and sample are stored to be checked when it is loaded."""
        return {
            "epoch": self.epoch,
            "update": self.update,
            "sample": self.sample,
            "stopped": self.stopped,
            "stopped_by": self.stopped_by if self.stopped else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a position.

        Raises:
            ConfigError: The update is at another sample now: the dataset or the batch size has changed.
        """
        update, sample = state_dict["update"], state_dict["sample"]
        if self.sample_at(update) != sample:
            raise ConfigError(
                f"update {update} was at sample {sample} and would now be at {self.sample_at(update)}: "
                "the dataset or the batch size has changed since",
                path="data",
            )
        self.update = update
        self.stopped = state_dict["stopped"]
        self.stopped_by = list(state_dict.get("stopped_by", ()))


@dataclass(frozen=True)
class Interval:
    """When something happens: every n epochs, updates or samples, at the start, at the end, or at several of these.

    Attributes:
        every_n_epochs: After every n-th epoch.
        every_n_updates: After every n-th update.
        every_n_samples: After the update with which another n samples have been seen.
        at_start: Before the first update.
        at_end: After the last update.

    Raises:
        ConfigError: None of them is given, or a number is not a positive whole one.
    """

    every_n_epochs: int | None = None
    every_n_updates: int | None = None
    every_n_samples: int | None = None
    at_start: bool = False
    at_end: bool = False

    def __post_init__(self) -> None:
        given = {name: n for name, n in self.__dict__.items() if n is not None and n is not False}
        if not given:
            raise ConfigError(f"one of {', '.join(self.__dict__)} is needed, not none")
        check_numbers("PositiveInt", **{name: n for name, n in given.items() if name.startswith("every")})

    def __str__(self) -> str:
        given = {name: n for name, n in self.__dict__.items() if n is not None and n is not False}
        return ", ".join(name if n is True else f"{name}={n}" for name, n in given.items())

    def check(self, counter: UpdateCounter, path: str) -> None:
        """Check that this can ever be due.

        Args:
            counter: The counter of the run.
            path: Config path of what has this interval.

        Raises:
            ConfigError: It counts in epochs, and the run has none.
        """
        if self.every_n_epochs is not None and not counter.has_epochs:
            raise ConfigError(f"{_NO_EPOCHS}, or use every_n_updates", path=f"{path}.every_n_epochs")

    def is_due(self, counter: UpdateCounter) -> bool:
        """Whether this is due now: after the last update, or at the start if there is none."""
        update = counter.update
        if update == 0:
            return self.at_start
        if self.every_n_updates is not None and update % self.every_n_updates == 0:
            return True
        if self.every_n_epochs is not None and self.follows_epoch(counter):
            return True
        if self.every_n_samples is not None:
            n = self.every_n_samples
            if counter.sample // n > counter.sample_at(update - 1) // n:
                return True
        return self.at_end and update == counter.end_update

    def next_due(self, counter: UpdateCounter) -> int | None:
        """Return the first update after the present one with which this is due; None if there is none."""
        update, due = counter.update, []
        if (n := self.every_n_updates) is not None:
            due.append((update // n + 1) * n)
        if (n := self.every_n_epochs) is not None:
            due.append((counter.epoch // n + 1) * n * counter.updates_per_epoch)
        if (n := self.every_n_samples) is not None:
            due.append(counter.update_at((counter.sample // n + 1) * n))
        if self.at_end and update < counter.end_update:
            due.append(counter.end_update)
        return min(due, default=None)

    def follows_epoch(self, counter: UpdateCounter) -> bool:
        """Whether this is due because of the epoch that has just been completed."""
        n = self.every_n_epochs
        return n is not None and counter.is_full_epoch and counter.epoch % n == 0

    def times(self, n: int) -> "Interval":
        """Return what is due every n-th time: the same with intervals that are n times as long."""
        given = self.every_n_epochs, self.every_n_updates, self.every_n_samples
        epochs, updates, samples = [every and every * n for every in given]
        return replace(self, every_n_epochs=epochs, every_n_updates=updates, every_n_samples=samples)

    def meets(self, other: "Interval", counter: UpdateCounter) -> int | None:
        """Return the first update of a run after which this and another interval are due, None if there is none.

        In a very long run, only the first few thousand candidates are checked.
        """
        step = max(interval._period(counter) for interval in (self, other))
        candidates = islice(range(0, counter.end_update + 1, step), _MOST_UPDATES_CHECKED)
        for update in (*candidates, counter.end_update):
            if self.is_due(counter.at(update)) and other.is_due(counter.at(update)):
                return update
        return None

    def _period(self, counter: UpdateCounter) -> int:
        """Return a divisor of all updates after which this is due, apart from the start and the end."""
        if self.every_n_samples is not None:
            return 1
        of_epochs = (self.every_n_epochs or 0) * counter.updates_per_epoch
        return gcd(of_epochs, self.every_n_updates or 0) or counter.end_update or 1
