"""The stored run that a run continues from."""

from collections.abc import Sequence
from dataclasses import dataclass

from ksuit_runner.record.mode import Mode


@dataclass(frozen=True)
class Origin:
    """The stored run that a run continues from.

    Attributes:
        mode: Whether it is resumed, a new run is forked from its checkpoint, or it is only evaluated.
        run_id: Its id.
        changes: Config paths whose values differ from its own.
        checkpoint: Name of the checkpoint to start from; None for the newest good one.
    """

    mode: Mode
    run_id: str
    changes: tuple[str, ...] = ()
    checkpoint: str | None = None

    @property
    def has_same_optimizer(self) -> bool:
        """Whether the stored state of optimizer and schedule is still valid."""
        others = (
            "optimizer",
            "schedule",
            "weight_decay_schedule",
            "loss",
            "trainer.parameter_rules",
            "trainer.reference_batch_size",
        )
        return not any(path.startswith(others) for path in self.changes)

    @property
    def has_other_model(self) -> bool:
        """Whether the settings of the model have changed."""
        return any(path.split(".")[0] == "model" for path in self.changes)

    @property
    def has_other_loss(self) -> bool:
        """Whether the settings of the loss have changed, such as class weights, which are part of its state."""
        return any(path.split(".")[0] == "loss" for path in self.changes)

    @property
    def has_new_end(self) -> bool:
        """Whether the length of the run has changed."""
        return any(
            path in ("trainer.max_epochs", "trainer.max_updates", "trainer.max_samples") for path in self.changes
        )

    def changes_all(self, callbacks: Sequence[str]) -> bool:
        """Whether each of some callbacks, those that stopped the run early, has other settings or was removed."""
        sections = [path for path in self.changes if path.partition(".")[0] in ("callbacks", "default_callbacks")]
        changed = [path.split(".")[1:2] for path in sections]  # one whose section is emptied has no name there
        return bool(callbacks) and all([name] in changed or [] in changed for name in callbacks)
