"""Reads which stored run a command line asks for, and finds it, before torch is imported."""

from collections.abc import Sequence
from dataclasses import dataclass

from ksuit_runner.config.compose import SWEEP_NODES, compose_locations, output_dir_of
from ksuit_runner.config.overrides import bare_name, root, value_of
from ksuit_runner.counter import Progress
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.stored_run import find_local, unknown_run

MODES = (Mode.RESUME, Mode.FORK, Mode.EVALUATE)


@dataclass(frozen=True)
class Request:
    """What a command line asks for: ``MODE=RUN`` or ``MODE=RUN@CHECKPOINT``."""

    mode: Mode
    query: str
    checkpoint: str | None = None

    def __str__(self) -> str:
        return f"{self.mode}={self.query}" + (f"@{self.checkpoint}" if self.checkpoint else "")


def requested(overrides: Sequence[str]) -> Request | None:
    """Return which stored run the command line asks for, and in which mode.

    Raises:
        ConfigError: It asks for several, or for a resume from the middle of a run.
    """
    found = [(mode, query) for mode in MODES if (query := value_of(mode, overrides)) is not None]
    if len(found) > 1:
        raise ConfigError(f"{found[0][0]} and {found[1][0]} cannot be given together")
    if not found:
        return None
    (mode, text), (query, _, checkpoint) = found[0], found[0][1].rpartition("@")
    if not query or Progress.parse(checkpoint) is None:  # a name may have an @, too
        return Request(mode, text)
    if mode == Mode.RESUME:
        raise ConfigError(f"resume={text}: a run is resumed from its newest checkpoint; from another one: fork={text}")
    return Request(mode, query, checkpoint)


def locate(request: Request, overrides: Sequence[str]) -> tuple[OutputPaths, str]:
    """Find the requested run; creates nothing, unless the run is fetched from a tracker.

    Raises:
        ResumeError: There is no such run, or several match.
    """
    query = request.query
    paths = OutputPaths(output_dir_of(overrides))
    run_id = find_local(paths, query)
    if run_id is None and (config := compose_locations(overrides)).tracker.get("uri"):
        from ksuit_runner.config.factory import Factory
        from ksuit_runner.recorder.tracker import open_tracker
        from ksuit_runner.resume.fetch_run import fetch

        run_id = fetch(open_tracker(Factory(config), paths), paths, query)
    if run_id is None and "@" in query and request.mode != Mode.RESUME:
        raise ConfigError(f"{request}: the @ after a run needs a checkpoint, such as E2_U90_S2880")
    if run_id is None:
        raise unknown_run(paths, query, request.mode)
    run = PathProvider(paths.output_dir, run_id)
    if not run.config.is_file() or not run.launch.is_file():
        raise ResumeError(f"{request}: run {run_id} has no stored config in {run.run_dir}")
    return paths, run_id


def refuse_sweep_settings(overrides: Sequence[str]) -> None:
    """Refuse settings of sweeps and launchers for a command that is about one run.

    Raises:
        ConfigError: There is such a setting.
    """
    for item in overrides:
        if root(item) in SWEEP_NODES and item not in ("sweep=null", "launcher=in_process"):
            one = f" A single run that is launched so: -m {item}" if bare_name(item) == "launcher" else ""
            raise ConfigError(
                f"{item}: this is about the runs of a sweep, and there is none. A sweep: -m, or sweep=NAME.{one}"
            )
