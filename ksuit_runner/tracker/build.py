"""Builds the tracker of a config: one, or several that record the same runs."""

from ksuit_runner.config.factory import Factory
from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import OutputPaths, is_run_id
from ksuit_runner.tracker.base import BaseTracker
from ksuit_runner.tracker.several import SeveralTrackers


def build_tracker(factory: Factory, output_paths: OutputPaths) -> BaseTracker:
    """Build the tracker of a config, which is not bound to a run yet."""
    beside = factory.objects_beside("tracker")
    for path in beside:
        if not is_run_id(path.partition(".")[2]):
            raise ConfigError("a name has letters, digits, '-' and '_'; files are named after it", path=path)
    paths = beside if beside and not factory.has("tracker._target_") else ["tracker", *beside]
    built = {
        path.rpartition(".")[2]: factory.build(path, BaseTracker, output_paths=output_paths)  # type: ignore[type-abstract]
        for path in paths
    }
    first = built.pop(paths[0].rpartition(".")[2])
    return SeveralTrackers(output_paths, first, built) if built else first
