"""Base class of callbacks that look at the features of a model's layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import nan
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from ksuit_runner.callback_bases.periodic import DatasetCallback, FurtherDataset
from ksuit_runner.config.types import DatasetKey, PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, named_type
from ksuit_runner.models.feature_extractor import FeatureExtractor

Labelled = tuple[Tensor, Tensor]
"""Features of shape (samples, values), and class indices of shape (samples,)."""


class Features(NamedTuple):
    """The features of a layer, of all samples of a dataset.

    Attributes:
        weights: Name of the weights; the live ones have the empty name.
        layer: Name of the layer.
        values: The features, of shape (samples, ...).
    """

    weights: str
    layer: str
    values: Tensor


class FeatureCallback(DatasetCallback):
    """Collects the features of layers over a dataset, in its order: override ``_process_results``.

    There, ``self.features()`` yields them for the live and all other weights, and ``self.gathered.rows["targets"]``
    has the targets, if they are a tensor. The ranks of a run share the batches, and each has all features in the end.

    Args:
        layers: Names of layers, or patterns of them; None takes the outputs of the model.
        pooling: How the outputs of a layer become the features of a sample, see ``FeatureExtractor``.
        channel_dim: The dimension of the channels, which ``mean`` and ``max`` leave, see ``FeatureExtractor``.
        **kwargs: Passed on to DatasetCallback.

    Raises:
        ConfigError: There is no such layer or pooling.
    """

    shares_work: ClassVar[bool] = True

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        pooling: Literal["none", "mean", "max", "cls", "flatten"] = "mean",
        channel_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        path = f"callbacks.{self.display_name}"
        self.extractor = FeatureExtractor(self.model.module, layers, pooling, channel_dim, path)

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        inputs, targets = self.trainer.inputs_and_targets(batch)
        if isinstance(targets, Tensor):
            self.gathered.add_rows("targets", targets)
        for weights, model in models.items():
            found = self.extractor(model, partial(self.trainer.predict, inputs, model))
            for layer, values in found.items():
                self.gathered.add_rows(("features", weights, layer), values)

    def features(self, of: FurtherDataset | None = None) -> Iterator[Features]:
        """Yield the features of the dataset, or of a further one."""
        for key, values in (self if of is None else of).gathered.rows.items():
            if isinstance(key, tuple):
                yield Features(key[1], key[2], values)

    def layer_key(self, metric: str, features: Features) -> str:
        """Return the key of a metric, as ``metric_key``: of several layers it begins with ``METRIC_LAYER``."""
        is_only = len(self.extractor.names) == 1
        return self.metric_key(metric if is_only else f"{metric}_{features.layer}", features.weights)


class ProbeCallback(FeatureCallback):
    """Measures features by a classifier that is fitted to those of one dataset and scored on those of another.

    A subclass names its metric, and computes the accuracy (``_accuracy``), which one rank does for all. Targets are
    class indices of shape (samples,). Features are flattened; if one of them is not finite, the accuracy is NaN.

    Args:
        fit_dataset_key: Key of the dataset to fit to. It is read as an evaluation reads it, and all of its features
            are held in memory.
        fit_batches: Fit to so many batches of it, the first ones; None takes all.
        **kwargs: Passed on to FeatureCallback.

    Attributes:
        metric: Name of the metric.

    Raises:
        ConfigError: Both datasets are the same, or there is nothing to fit to; or, before the first update, the targets
            are not class indices.
    """

    shares_work: ClassVar[bool] = True
    metric: ClassVar[str]

    def __init__(self, fit_dataset_key: DatasetKey, fit_batches: PositiveInt | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fit_dataset_key == self.dataset_key:
            raise ConfigError(f"fit_dataset_key: a probe is scored on other samples than those of '{self.dataset_key}'")
        check_numbers("PositiveInt", fit_batches=fit_batches)
        self._fitted = self.also_read(fit_dataset_key, fit_batches)

    @property
    def fit_samples(self) -> int | None:
        """Number of samples that the classifier is fitted to; None if it is unknown, as for a stream."""
        size, batches = self.batch_size or self.data_container.eval_batch_size, self._fitted.max_batches
        dataset: Any = self.data_container.datasets.get(self._fitted.dataset_key)
        most = len(dataset) if hasattr(dataset, "__len__") else None
        return most if batches is None or most is None else min(most, batches * size)

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        targets = self.trainer.inputs_and_targets(batch)[1]
        if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
            is_tensor = isinstance(targets, Tensor)
            found = f"a tensor of shape {tuple(targets.shape)}" if is_tensor else named_type(targets)
            raise ConfigError(
                f"class indices of shape (samples,) are needed as targets, not {found}",
                path=f"callbacks.{self.display_name}",
            )
        super()._process_batch(batch, models)

    @abstractmethod
    def _accuracy(self, fitted: Labelled, scored: Labelled) -> float:
        """Return the accuracy on the features and classes of one dataset of a classifier fitted to those of another."""

    def _process_results(self, update_counter: UpdateCounter) -> None:
        world = self.data_container.world
        found = world.broadcast(self._accuracies() if world.records else None)
        for key, value in found.items():
            self.writer.add_scalar(key, value)

    def _accuracies(self) -> dict[str, float]:
        fitted = {(item.weights, item.layer): item.values.flatten(1) for item in self.features(self._fitted)}
        classes, targets = (reader.gathered.rows["targets"] for reader in (self._fitted, self))
        found = {}
        for item in self.features():
            bank, features = fitted[item.weights, item.layer], item.values.flatten(1)
            is_finite = bool(bank.isfinite().all() and features.isfinite().all())
            value = self._accuracy((bank, classes), (features, targets)) if is_finite else nan
            found[self.layer_key(self.metric, item)] = value
        return found
