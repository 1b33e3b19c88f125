"""The metrics of torchmetrics, computed batch by batch, so that ranks and resumes can add up their states.

torchmetrics itself is imported by whoever makes a metric, and not here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.errors import ConfigError
from ksuit_runner.system.optional_package import require_package
from ksuit_runner.trainer.gathered import Gathered
from ksuit_runner.trainer.heads import OF_NUMBERS, described, not_classes
from ksuit_runner.trainer.sums import Sums, Total

_SIZES = ("num_classes", "num_labels")
_PLAIN = (bool, int, float, str, NoneType)


def batch_metrics(
    path: str, given: Mapping[str, Any], device: torch.device, output_shape: Sequence[int], sums_only: bool = False
) -> dict[str, BatchMetric]:
    """Return metrics by name.

    Args:
        path: Config path of the callback.
        given: Its argument ``metrics``.
        device: Device of the run.
        output_shape: Shape of the model's output, as far as it is known.
        sums_only: Whether all states of the metrics have to be sums.

    Raises:
        ConfigError: There are none, torchmetrics is not installed, or one of them is wrong, see ``BatchMetric``.
    """
    require_package("torchmetrics", path=path)
    if not given:
        raise ConfigError("at least one metric by name is needed", path=f"{path}.metrics")
    classes = output_shape[0] if len(output_shape) == 1 else None
    return {
        name: BatchMetric(item, f"{path}.metrics.{name}", device, classes, sums_only) for name, item in given.items()
    }


class BatchMetric:
    """A metric of torchmetrics that treats every batch as torchmetrics treats a rank.

    For each batch the metric starts from its default states and is updated once. The states then go into ``Gathered``
    or ``Sums``: those that are sums are added up in float64; all others become rows, one for each batch, or for each
    item if the state is a list. In the end the states of all batches are reduced as torchmetrics reduces those of
    ranks. So the metric itself holds nothing, and its value depends neither on the number of ranks nor on resumes.

    Args:
        given: The metric, or a partial of its class, which is given ``num_classes`` or ``num_labels``, as many as the
            outputs have, unless the config has given it.
        path: Config path of the metric.
        device: Device of the run.
        classes: Number of classes of the data, if it is known, to find mistakes before training.
        sums_only: Whether all of its states have to be sums; then only the first batch is validated, since that waits
            for the device.

    Raises:
        ConfigError: It is not a metric, or its arguments are wrong; or not all of its states are sums. Without
            ``classes`` raised at the first batch.

    Attributes:
        description: The class of the metric and its arguments, as far as they are plain values.
    """

    def __init__(
        self, given: Any, path: str, device: torch.device, classes: int | None = None, sums_only: bool = False
    ) -> None:
        self._given, self._path, self._device, self._sums_only = given, path, device, sums_only
        self._sizes: list[str] = []
        self.description = _description(given)
        if isinstance(given, partial):
            asked = inspect.signature(given.func).parameters
            self._sizes = [name for name in _SIZES if name in asked and name not in given.keywords]
            if _is_of_one_class(given.func):
                self._given = _without_average(given)
        self._metric: Any = None
        self._classes = classes
        if classes is not None or not self._sizes:
            self._metric = self._made(classes)

    def add(self, to: Gathered | Sums, key: tuple[Any, ...], outputs: Tensor, targets: Tensor) -> None:
        """Add what a batch does to the states of the metric.

        Args:
            to: What they are added to.
            key: Beginning of their keys.
            outputs: Scores of shape (samples, classes, ...) or (samples, ..., classes), or whatever the metric takes.
            targets: Class indices of shape (samples, ...), or whatever the metric takes. Of probabilities of classes
                the most probable one counts; labels may be numbers, as a loss takes them.

        Raises:
            ConfigError: The metric does not take them.
        """
        if outputs.ndim > 2 and outputs.shape[:-1] == targets.shape:  # classes last, as in a training step
            outputs = outputs.movedim(-1, 1)
        if outputs.is_floating_point() and outputs.element_size() < 4:
            outputs = outputs.float()
        classes = outputs.shape[1] if outputs.ndim > 1 else 1
        metric = self._for(classes)
        if targets.is_floating_point() and _is_of_classes(metric):
            targets = self._indices(metric, outputs, targets)
        metric.reset()
        try:
            metric.update(outputs, targets)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            raise self._unfit(metric, outputs, targets, str(error)) from error
        if self._sums_only and _is_of_classes(metric):
            metric.validate_args = False
        to.add((*key, "classes"), classes, count=1)
        for name, state in metric.metric_state.items():
            _add_state(to, (*key, name), state, _is_sum(metric, name))

    def values(
        self, totals: Mapping[Any, Total], rows: Mapping[Any, Tensor], key: tuple[Any, ...]
    ) -> Iterator[tuple[str, Tensor]]:
        """Compute the metric over all batches.

        Args:
            totals: Sums, by key.
            rows: Rows, by key.
            key: Beginning of the keys, as given to ``add``.

        Returns:
            Its values, each with the end of its name: empty for a scalar, ``_3`` for the entry of a class, ``_KEY`` for
            one of several by name. None over no batch, such as of updates that were all skipped.
        """
        if (*key, "classes") not in totals:
            return
        metric = self._for(round(totals[(*key, "classes")].mean))
        metric.reset()
        for name, default in metric.metric_state.items():
            setattr(metric, name, _state(default, metric._reductions[name], totals, rows, (*key, name)))
        metric._update_count = 1  # compute() warns of a metric that was not updated
        value = metric.compute()
        metric.reset()
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, entry in items:
            if not isinstance(entry, Tensor) or entry.ndim > 1:
                raise ConfigError(f"{type(metric).__name__} computes a curve or the like, not numbers", path=self._path)
            end = f"_{name}" if name else ""
            if entry.numel() == 1:
                yield end, entry
            else:
                yield from ((f"{end}_{index}", item) for index, item in enumerate(entry))

    def _indices(self, metric: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return class indices for targets that are numbers: labels, or the probability of each class."""
        has_one = hasattr(metric, "num_classes") and targets.ndim > 1
        found = targets.argmax(1) if has_one else targets.long()
        if metric.validate_args:
            is_class = (targets.sum(1) - 1).abs() < 0.01 if has_one else found == targets
            if not is_class.all():
                raise self._unfit(metric, outputs, targets)
        return found

    def _unfit(self, metric: Any, outputs: Tensor, targets: Tensor, reason: str = "") -> ConfigError:
        of_classes = hasattr(metric, "num_classes")
        what = not_classes(outputs, targets) if of_classes else f"it does not take {described(outputs, targets)}"
        says = f"\ntorchmetrics says: {reason}" if reason else ""
        return ConfigError(f"{type(metric).__name__}: {what}{says}", path=self._path)

    def _for(self, classes: int) -> Any:
        """Return the metric for outputs with so many classes."""
        if self._metric is None or (self._sizes and classes != self._classes):
            self._metric, self._classes = self._made(classes), classes
        return self._metric

    def _made(self, classes: int | None) -> Any:
        metric = self._given
        if isinstance(metric, partial):
            try:
                metric = metric(**dict.fromkeys(self._sizes, classes))
            except Exception as error:  # whatever the constructor raises
                if self._sizes and classes == 1:
                    what = "it is of classes, and outputs have one value for each sample"
                    raise ConfigError(f"{what}. {OF_NUMBERS}", path=self._path) from error
                raise ConfigError(f"{type(error).__name__}: {error}", path=self._path) from error
        states = getattr(metric, "metric_state", None)
        if not states or any(hasattr(child, "metric_state") for child in metric.children()):
            raise ConfigError(
                f"a metric of torchmetrics with states of its own is needed, not {type(metric).__name__}",
                path=self._path,
            )
        for name in states if self._sums_only else ():
            if not _is_sum(metric, name):
                raise ConfigError(
                    f"{type(metric).__name__} would hold '{name}' of every batch, and not their sum. Evaluate it on "
                    "a dataset, or give it thresholds if it has that argument",
                    path=self._path,
                )
        metric.distributed_available_fn = lambda: False  # the states of ranks come together in the run's own way
        return metric.to(self._device)


def _description(given: Any) -> str:
    made_of, values = (given.func, given.keywords) if isinstance(given, partial) else (type(given), vars(given))
    plain = {name: value for name, value in values.items() if name[0] != "_" and isinstance(value, _PLAIN)}
    return f"{made_of.__qualname__} {sorted(plain.items())}"


def _is_of_one_class(metric: Any) -> bool:
    """Whether a class knows no ``average``, nor do those that it may pass one on to, and no number of classes."""
    if not isinstance(metric, type):
        return False
    constructors = [metric, *(vars(base)["__init__"] for base in metric.__mro__ if "__init__" in vars(base))]
    named = {name for each in constructors for name in inspect.signature(each).parameters}
    return not {"average", *_SIZES} & named


def _without_average(given: partial[Any]) -> partial[Any]:
    """Return the partial of a metric without ``average``: of one class there is none, and the shipped files have it."""
    return partial(
        given.func, *given.args, **{name: value for name, value in given.keywords.items() if name != "average"}
    )


def _is_of_classes(metric: Any) -> bool:
    """Whether it is a metric of classification."""
    return hasattr(metric, "validate_args")


def _is_sum(metric: Any, name: str) -> bool:
    reduction = metric._reductions[name]
    return getattr(reduction, "__name__", "") == "dim_zero_sum" and isinstance(getattr(metric, name), Tensor)


def _add_state(to: Gathered | Sums, key: tuple[Any, ...], state: Tensor | list[Tensor], is_sum: bool) -> None:
    if is_sum:
        assert isinstance(state, Tensor)
        to.add(key, state)
        return
    assert isinstance(to, Gathered)
    if isinstance(state, Tensor):
        to.add_rows(key, state.unsqueeze(0))
    elif state:
        items = [item if item.ndim else item.unsqueeze(0) for item in state]
        to.add_rows(key, torch.cat(items))
        to.add_rows((*key, "lengths"), torch.tensor([len(item) for item in items]))


def _state(
    default: Tensor | list[Tensor],
    reduction: Any,
    totals: Mapping[Any, Total],
    rows: Mapping[Any, Tensor],
    key: tuple[Any, ...],
) -> Any:
    """Return a state over all batches, as torchmetrics makes one of those of its ranks."""
    if key in totals:
        return totals[key].sum
    if isinstance(default, list):
        return list(torch.split(rows[key], rows[(*key, "lengths")].tolist())) if key in rows else []
    of_batches = rows[key]
    if reduction is not None:
        return reduction(of_batches)
    return of_batches if len(of_batches) > 1 else of_batches[0]
