"""Builds the tracker of a config."""

from ksuit_runner.config.factory import Factory
from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker.base import BaseTracker


def build_tracker(factory: Factory, output_paths: OutputPaths) -> BaseTracker:
    """Build the tracker of a config, which is not bound to a run yet."""
    return factory.build("tracker", BaseTracker, output_paths=output_paths)  # type: ignore[type-abstract]
