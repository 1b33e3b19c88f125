"""Tags by which MLflow's page knows where a run comes from, and which page it shows for an experiment."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from ksuit_runner.tracker.start_tags import COMMAND_TAG, DESCRIPTION_TAG, NOTES_TAG, USER_TAG

NOTE_TAG = "mlflow.note.content"
"""Tag with the description of a run, in Markdown."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tags of an experiment by which the page shows training runs: by default it shows what is for language models."""

_SAME = {
    USER_TAG: "mlflow.user",
    "git.commit": "mlflow.source.git.commit",
    "git.branch": "mlflow.source.git.branch",
}


def with_shown(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a run together with those by which the page shows user, source and description."""
    shown = {name: tags[tag] for tag, name in _SAME.items() if tag in tags}
    about = tags.get(DESCRIPTION_TAG)
    if command := tags.get(COMMAND_TAG):
        shown |= {"mlflow.source.type": "LOCAL", "mlflow.source.name": _program(command)}
        about = about or f"```\n{command}\n```"
    if about:
        shown[NOTE_TAG] = "\n\n".join(filter(None, (tags.get(NOTES_TAG), about)))
    return shown | dict(tags)


def _program(command: str) -> str:
    """Return the module or script that a command runs; the page shows only what follows the last slash."""
    try:
        words = shlex.split(command)
    except ValueError:  # it was cut or masked
        words = command.split()
    if words[:2] == ["python", "-m"]:
        return " ".join(words[2:3])
    return Path(words[0]).name if words else ""
