"""The stored run that a run goes on from."""

from collections.abc import Sequence
from dataclasses import dataclass

from ksuit_runner.record.mode import Mode


@dataclass(frozen=True)
class Origin:
    """The stored run that a run goes on from.

    Attributes:
        mode: ``resume`` goes on with it, ``fork`` begins a new one from its checkpoint, ``evaluate`` only looks.
        run_id: Its id.
        changes: Places of the config that differ from its own.
        checkpoint: Name of the checkpoint to go on from; None for the newest good one.
    """

    mode: Mode
    run_id: str
    changes: tuple[str, ...] = ()
    checkpoint: str | None = None

    @property
    def has_same_optimizer(self) -> bool:
        """Whether what was stored about learning rates and schedule still holds."""
        others = ("optimizer", "schedule", "loss", "trainer.parameter_rules")
        return not any(place.startswith(others) for place in self.changes)

    @property
    def has_other_model(self) -> bool:
        """Whether the model was given other settings."""
        return any(place.split(".")[0] == "model" for place in self.changes)

    @property
    def has_other_loss(self) -> bool:
        """Whether the loss was given other settings, such as class weights, which are part of its state."""
        return any(place.split(".")[0] == "loss" for place in self.changes)

    @property
    def has_new_end(self) -> bool:
        """Whether the run was given another length."""
        return any(
            place in ("trainer.max_epochs", "trainer.max_updates", "trainer.max_samples") for place in self.changes
        )

    def changes_all(self, callbacks: Sequence[str]) -> bool:
        """Whether each of some callbacks was given other settings, or removed: those that have ended a run early."""
        sections = [place for place in self.changes if place.partition(".")[0] in ("callbacks", "default_callbacks")]
        changed = [place.split(".")[1:2] for place in sections]  # one whose section is emptied has no name there
        return bool(callbacks) and all([name] in changed or [] in changed for name in callbacks)
