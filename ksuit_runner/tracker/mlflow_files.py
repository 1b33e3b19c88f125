"""The tags by which MLflow's page knows which artifacts of a run are charts of images, or tables."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ksuit_runner.record.point import LoggedFile

_IMAGES, _TABLES = "mlflow.loggedImages", "mlflow.loggedArtifacts"
_TABLE_KINDS = ("tables", "histograms")
_LONGEST_TAG = 5000  # characters that every store keeps; tables that do not fit are shown as JSON


def shown_files(files: Sequence[LoggedFile], tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags for files that were logged.

    Args:
        files: The files, in the order in which they were logged.
        tags: Tags that the run has.
    """
    changed = {}
    if any(file.kind == "images" for file in files):
        changed[_IMAGES] = "True"
    if new := [file.path for file in files if file.kind in _TABLE_KINDS]:
        known: list[dict[str, str]] = []
        with suppress(ValueError):
            known = json.loads(tags.get(_TABLES, "[]"))
        added = [{"path": path, "type": "table"} for path in new]
        tables = [entry for entry in known if entry not in added] + added
        while len(text := json.dumps(tables)) > _LONGEST_TAG:
            del tables[0]
        changed[_TABLES] = text
    return changed
