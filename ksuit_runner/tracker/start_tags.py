"""The tags that say what a run is, how it was started, and by whom."""

import getpass

COMMAND_TAG = "ksuit.command"
"""Tag with the command line that started a run."""
USER_TAG = "ksuit.user"
"""Tag with the name of the user who started it."""
DESCRIPTION_TAG = "ksuit.description"
"""Tag with a description in Markdown."""


def start_tags(command: str) -> dict[str, str]:
    """Return the tags of a run that this process starts; without the user where there is no name."""
    try:
        return {COMMAND_TAG: command, USER_TAG: getpass.getuser()}
    except (KeyError, OSError, ImportError):  # a container may have users without a name
        return {COMMAND_TAG: command}
