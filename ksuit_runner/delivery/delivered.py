"""What a run's tracker has of its outbox, as stored beside it, and both read together."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from ksuit_runner.delivery.outbox import Count, Outbox
from ksuit_runner.paths import PathProvider, RunId
from ksuit_runner.system.atomic_files import write_json
from ksuit_runner.system.untrusted_files import UnsafeFileError, conform, read_json
from ksuit_runner.tracker.base import EndStatus

_LOGGER = logging.getLogger(__name__)


class Delivery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of a run's outbox is delivered; written only by whoever records the run, who does not write the outbox.

    Attributes:
        tracker_id: Id of the run in the tracker's store; None while it is not registered there.
        version: Version of the outbox that is delivered.
        status: How the run ended, as the tracker knows it; None if it does not.
        end_time: When, in ms since 1970.
        models: Number of versions of models that are registered.
        listed: Paths of the checkpoints, or their exports, that are listed among the models, by their tags.
    """

    tracker_id: RunId | None = None
    version: Count = 0
    status: EndStatus | None = None
    end_time: Count | None = None
    models: Count = 0
    listed: dict[str, str] = msgspec.field(default_factory=dict)

    @classmethod
    def load(cls, paths: PathProvider, box: Outbox) -> Delivery:
        """Read what was stored in a run's folder; without a usable file nothing is delivered: doing it again is safe.

        Args:
            paths: Paths of the run.
            box: Its outbox, which knows the id that it started with.
        """
        try:
            return conform(cls, read_json(paths.delivered, paths.runs_dir))
        except UnsafeFileError:
            return cls(box.tracker_id)

    def store(self, paths: PathProvider) -> None:
        """Write it to a run's folder. On a full disk it is kept in memory only, and is delivered again another time."""
        try:
            write_json(paths.delivered, msgspec.to_builtins(self))
        except OSError as error:
            _LOGGER.error("what the tracker of run %s has could not be written: %s", paths.run_id, error)


@dataclass(frozen=True)
class RunState:
    """A run's outbox and how much of it is delivered."""

    box: Outbox
    delivery: Delivery

    @property
    def tracker_id(self) -> str | None:
        """Id of the run in the tracker's store; None while it is not registered there."""
        return self.delivery.tracker_id

    @property
    def has_messages(self) -> bool:
        """Whether something is to be delivered, apart from the end of the run."""
        return self.tracker_id is None or self.delivery.version != self.box.version

    @property
    def has_models(self) -> bool:
        """Whether the run has ended, and versions of models are to be registered."""
        return self.box.status is not None and self.delivery.models < len(self.box.models)

    @property
    def has_end(self) -> bool:
        """Whether the run has ended and that is not delivered yet."""
        told = (self.delivery.status, self.delivery.end_time)
        return self.box.status is not None and told != (self.box.status, self.box.end_time)


def read_state(paths: PathProvider) -> RunState | None:
    """Read what is stored in a run's folder; None if it has no outbox.

    Raises:
        TrackerError: The outbox is damaged, or is another run's.
    """
    box = Outbox.load(paths)
    return None if box is None else RunState(box, Delivery.load(paths, box))
