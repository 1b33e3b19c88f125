"""Which checkpoints of a run are listed among the models of its experiment: one rule, whatever has ended the run."""

from pathlib import Path

from ksuit_runner.checkpoint.folders import read_tags, weights_in
from ksuit_runner.delivery.delivered import RunState
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import ResumeError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_folder, check_inside
from ksuit_runner.tracker.base import ModelVersion

_DESCRIPTION = "MLmodel"  # without this file MLflow loads nothing


def unlisted(paths: PathProvider, state: RunState) -> list[ModelVersion]:
    """Return the checkpoints that a run is to list among its models and has not yet; none before it has ended.

    Args:
        paths: Paths of the run.
        state: What is to be delivered of it, and what is.
    """
    box, known = state.box, state.delivery.listed
    if box.status is None or not box.listed:
        return []
    tags = read_tags(paths)
    models = [_model(paths, box, tag, tags[tag]) for tag in box.listed if tag in tags]
    return [model for model in models if known.get(model.name) != (model.export or model.path)]


def _model(paths: PathProvider, box: Outbox, tag: str, name: str) -> ModelVersion:
    folder, keys = paths.checkpoints_dir / name, box.listed[tag]
    suffix = keys[0].rpartition("/")[2]
    weights = suffix if suffix in weights_in(folder) else "model"
    exports = [export.path for export in box.exports if (export.checkpoint, export.weights) == (name, weights)]
    there = [path for path in exports if _can_be_loaded(paths.artifacts_dir / path, paths.artifacts_dir)]
    path = str(folder.relative_to(paths.artifacts_dir))
    return ModelVersion(path, tag, None, keys, weights, there[0] if there else None)


def _can_be_loaded(folder: Path, root: Path) -> bool:
    """Whether a folder is there, and holds nothing that is elsewhere: it may be uploaded."""
    try:
        check_inside(folder, root)
        check_folder(folder)
    except (UnsafeFileError, ResumeError):
        return False
    return (folder / _DESCRIPTION).is_file()
