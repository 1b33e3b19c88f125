"""Scores and targets of classification in what models return and batches hold, also of one head of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.errors import ConfigError, did_you_mean, named_type
from ksuit_runner.tensors.nested import entries, named_tensors
from ksuit_runner.trainer.tensor_note import as_text

OF_NUMBERS = (
    "For a regression there is regression_errors, for two classes with one score a metric of torchmetrics such as "
    "BinaryAccuracy"
)
"""What is for outputs with one value for each sample, for errors."""


@dataclass(frozen=True)
class Head:
    """A head of a model: where its outputs and their targets are, and which of them count.

    Attributes:
        outputs: Path of its outputs in what the model returns, such as ``digit``, ``heads/0``; empty for the whole.
        targets: Path of its targets in those of the batch, in the same way.
        classes: Count the targets of these classes only; None counts all.
        restrict_scores: Whether only these classes compete for a target, as in the protocol of ImageNet-R (Hendrycks
            et al., "The many faces of robustness", 2021), where a model of 1000 classes is tested on 200.
        ignore_index: Target that does not count, such as -100.
        per_pixel: Whether each sample has many targets, as in a segmentation, and one alone is a mistake.
        path: Config path of the head, for errors.

    Raises:
        ConfigError: The classes are not different numbers of at least 0, or only these are to compete and there are
            none.
    """

    outputs: str = ""
    targets: str = ""
    classes: Sequence[int] | None = None
    restrict_scores: bool = False
    ignore_index: int | None = None
    per_pixel: bool = field(default=False, repr=False)
    path: str | None = None

    def __post_init__(self) -> None:
        given = self.classes
        if given is not None and not _are_classes(given):
            raise ConfigError(
                f"different class indices of at least 0 are needed, not {given}", path=self._at("classes")
            )
        if self.restrict_scores and given is None:
            raise ConfigError("there are no `classes` to restrict them to", path=self._at("restrict_scores"))

    @classmethod
    def from_config(cls, path: str, given: Mapping[str, Any]) -> "Head":
        """Make a head of what a config says at a path."""
        known = {field.name for field in fields(cls)} - {"path"}
        for key in given:
            if key not in known:
                raise ConfigError(f"there is no '{key}'. {did_you_mean(key, known)}", path=path)
        ways = {key: str(given[key]) for key in ("outputs", "targets") if key in given}  # YAML may hold a number
        return cls(**{**given, **ways}, path=path)

    def find(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return the outputs and targets of this head.

        Raises:
            ConfigError: There is no tensor at a path, or a sample has one target where it needs many.
        """
        own = _tensor_at(outputs, self.outputs, "outputs", self._at("outputs"))
        wanted = _tensor_at(targets, self.targets, "targets", self._at("targets"))
        if self.per_pixel and wanted.ndim < 2:
            raise ConfigError(
                "a class for each pixel is needed, as scores of shape (batch, classes, height, width) and targets of "
                f"shape (batch, height, width), not {described(own, wanted)}. per_pixel=false takes whole samples, too",
                path=self.path,
            )
        return own, wanted

    def scores(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return scores of shape (..., classes), classes of shape (...), and which of these count; None for all.

        Raises:
            ConfigError: There is no tensor at a path, the targets are not class indices, or the head has a class that
                the model lacks.
        """
        scores, targets = self.find(outputs, targets)
        scores = classes_last(scores, targets, self.path)
        counted = None if self.ignore_index is None else targets != self.ignore_index
        if self.classes is None:
            return scores, targets, counted
        if max(self.classes) >= scores.shape[-1]:
            raise ConfigError(
                f"{max(self.classes)} is not one of the {scores.shape[-1]} classes, which are counted from 0",
                path=self._at("classes"),
            )
        classes = torch.tensor(list(self.classes), device=targets.device)
        if self.restrict_scores:
            lost = torch.full_like(scores, -torch.inf)
            scores = lost.index_copy(-1, classes, scores.index_select(-1, classes))
        is_chosen = torch.isin(targets, classes)
        return scores, targets, is_chosen if counted is None else is_chosen & counted

    def _at(self, key: str) -> str | None:
        return None if self.path is None else f"{self.path}.{key}"


def classes_last(scores: Tensor, targets: Tensor, path: str | None = None) -> Tensor:
    """Return scores with the classes in the last dimension.

    Args:
        scores: Scores of shape (samples, ..., classes), or (samples, classes, ...) as in torch's cross-entropy; where
            both fit, it is the first one, as in ``SgdTrainer.training_step``.
        targets: Class indices of shape (samples, ...).
        path: Config path of what needs them, for errors.

    Raises:
        ConfigError: The targets are not class indices.
    """
    if not targets.is_floating_point():
        if scores.shape[:-1] == targets.shape:
            return scores
        if scores.shape[:1] + scores.shape[2:] == targets.shape:
            return scores.movedim(1, -1)
    raise ConfigError(not_classes(scores, targets), path=path)


def not_classes(scores: Tensor, targets: Tensor) -> str:
    """Return the message that outputs and targets are not those of a classification."""
    hint = f". {OF_NUMBERS}" if targets.is_floating_point() else ""
    needed = "scores of shape (batch, classes, ...) and class indices of shape (batch, ...)"
    return f"{needed} are needed, not {described(scores, targets)}{hint}"


def described(outputs: Tensor, targets: Tensor) -> str:
    """Return shapes and types of outputs and targets, for errors."""
    return f"outputs {as_text(outputs)} and targets {as_text(targets)}"


def _are_classes(given: Any) -> bool:
    is_list = isinstance(given, (list, tuple)) and len(given) > 0 and len(set(given)) == len(given)
    return is_list and all(isinstance(item, int) and item >= 0 for item in given)


def _tensor_at(tree: Any, way: str, kind: str, path: str | None) -> Tensor:
    found: Any = tree
    for key in way.split("/") if way else ():
        found = {str(name): value for name, value in entries(found)}.get(key)
    if isinstance(found, Tensor):
        return found
    ways = [way for way, _ in named_tensors(tree)]
    if not ways:
        raise ConfigError(f"there are no several {kind}, but {named_type(tree)}: leave it out", path=path)
    wrong = f"there is no '{way}' in the {kind}" if way else f"there are several {kind}, of which one has to be named"
    raise ConfigError(f"{wrong}. {did_you_mean(way, ways)}", path=path)
