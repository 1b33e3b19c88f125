"""Changes what is noted about a stored run: ``annotate=RUN notes="..." tags=[...]``."""

from collections.abc import Sequence

from omegaconf import OmegaConf

from ksuit_runner.cli.sync import deliver
from ksuit_runner.config.check.whole_config import check_plain_values, resolve
from ksuit_runner.config.compose import compose_config, with_trackers_beside
from ksuit_runner.config.overrides import allow_only, root
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import ConfigError
from ksuit_runner.resume.request import find_stored
from ksuit_runner.tracker.start_tags import COMMAND_TAG, changed_annotations
from ksuit_runner.ui.terminal import make_console

_TELLS = ("notes", "tags")
_TAKES = ("output_dir", "tracker", "trust")


def annotate(query: str, overrides: Sequence[str]) -> int:
    """Replace notes or tags of a run that no process trains, here and at its tracker.

    Args:
        query: The run.
        overrides: The command line: ``notes``, ``tags`` or both, and where the run is.

    Returns:
        The exit status, 0: they are stored and delivered.

    Raises:
        ConfigError: Neither is given, or one is of another kind.
        ResumeError: There is no such run, or it is alive: what its tracker is told is written by its process.
        TrackerError: The tracker cannot be reached; they are stored, and ``sync=`` delivers them.
    """
    allow_only(overrides, "annotate", *_TELLS, *_TAKES)
    given = {root(item) for item in overrides}.intersection(_TELLS)
    if not given:
        raise ConfigError(f"annotate={query}: say what: notes=\"...\" or 'tags=[baseline,paper]'")
    composed = compose_config(with_trackers_beside(overrides))
    told = resolve(OmegaConf.masked_copy(composed, list(_TELLS)))
    check_plain_values(told)
    found = find_stored("annotate", query, overrides)

    def change(box: Outbox) -> None:
        box.add_tags(changed_annotations(told, given, box.start_tags.get(COMMAND_TAG)), box.run_id)

    deliver(found.paths, composed, overrides, change)
    make_console().print(f"{' and '.join(sorted(given))} of {found.run_id} changed", soft_wrap=True)
    return 0
