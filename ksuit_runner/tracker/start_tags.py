"""The tags that say what a run is, how it was started, and by whom."""

import getpass
from collections.abc import Collection, Mapping
from typing import Any

COMMAND_TAG = "ksuit.command"
"""Tag with the command line that started a run."""
USER_TAG = "ksuit.user"
"""Tag with the name of the user who started it."""
DESCRIPTION_TAG = "ksuit.description"
"""Tag with a description in Markdown."""
NOTES_TAG, TAGS_TAG = "ksuit.notes", "ksuit.tags"
"""Tags with what the user says of the run: a text, and words with commas between them."""
_SHOWN_TOGETHER = (COMMAND_TAG, DESCRIPTION_TAG, NOTES_TAG)


def start_tags(command: str) -> dict[str, str]:
    """Return the tags of a run that this process starts; without the user where there is no name."""
    try:
        return {COMMAND_TAG: command, USER_TAG: getpass.getuser()}
    except (KeyError, OSError, ImportError):  # a container may have users without a name
        return {COMMAND_TAG: command}


def annotations(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags that say what ``notes`` and ``tags`` of a config do; of those that are neither null nor empty."""
    return {tag: text for tag, text in _annotations(config).items() if text}


def changed_annotations(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, str]:
    """Return the tags that a later change sets; an empty one replaces what was there.

    Args:
        config: The config.
        keys: What has changed of ``notes`` and ``tags``; other keys do not count.
    """
    told = _annotations(config)
    return {tag: told[tag] for key, tag in (("notes", NOTES_TAG), ("tags", TAGS_TAG)) if key in keys}


def with_shown_together(changed: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, str]:
    """Return changed tags of a run, and those of its other tags that a page shows in one text with them.

    MLflow's page has one text for notes, description and command. The tracker writes it from the tags that it is sent,
    and so needs all three whenever one of them changes.
    """
    is_shown = not changed.keys().isdisjoint(_SHOWN_TOGETHER)
    return {**({tag: tags[tag] for tag in _SHOWN_TOGETHER if tag in tags} if is_shown else {}), **changed}


def told(tags: Mapping[str, str]) -> dict[str, Any]:
    """Return ``notes`` and ``tags`` of a config that say what a run was last told; those that its tags have.

    A text that would refer to something in a config is left out: the tags of a run may come from others.
    """
    known = {tag: tags[tag] for tag in (NOTES_TAG, TAGS_TAG) if "${" not in tags.get(tag, "${")}
    found: dict[str, Any] = {}
    if NOTES_TAG in known:
        found["notes"] = known[NOTES_TAG] or None
    if TAGS_TAG in known:
        found["tags"] = [word for word in known[TAGS_TAG].split(", ") if word]
    return found


def _annotations(config: Mapping[str, Any]) -> dict[str, str]:
    words = config.get("tags") or ()
    return {
        NOTES_TAG: str(config.get("notes") or ""),
        TAGS_TAG: words if isinstance(words, str) else ", ".join(map(str, words)),
    }
