"""Changes what is noted about a stored run or sweep: ``annotate=RUN notes="..." tags=[...]``."""

from collections.abc import Sequence

from omegaconf import OmegaConf

from ksuit_runner.cli.sync import deliver
from ksuit_runner.config.check.whole_config import check_plain_values, resolve
from ksuit_runner.config.compose import compose_config, with_trackers_beside
from ksuit_runner.config.overrides import allow_only, root
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import PathProvider
from ksuit_runner.resume.request import find_stored
from ksuit_runner.sweep.stored_sweep import find_sweep
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.start_tags import changed_annotations
from ksuit_runner.ui.terminal import make_console

_TELLS = ("notes", "tags")
_TAKES = ("output_dir", "tracker", "trust")


def annotate(query: str, overrides: Sequence[str]) -> int:
    """Replace notes or tags of a run or a sweep that no process trains, here and at its tracker.

    Args:
        query: The run, or the sweep.
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

    def change(box: Outbox) -> None:
        box.add_tags(changed_annotations(told, given), box.run_id)

    if (sweep := find_sweep(query, overrides)) is None:
        run_id = (found := find_stored("annotate", query, overrides)).run_id
        deliver(found.paths, composed, overrides, change)
    else:
        from ksuit_runner.sweep.commands import stored_factory

        run_id = sweep.sweep_id
        with RunLock(sweep.lock):
            factory = stored_factory(sweep, overrides)
            deliver(PathProvider(sweep.output_dir, run_id), composed, overrides, change, factory)
    make_console().print(f"{' and '.join(sorted(given))} of {run_id} changed", soft_wrap=True)
    return 0
