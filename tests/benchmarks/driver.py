"""Driving the runner as a user does: a config composed from overrides, and a whole run in this process."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from omegaconf import OmegaConf, open_dict
from rich.console import Console

from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.engine.runner import run
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.stored_run import Launch

CLOCK = "+callbacks.clock._target_=benchmarks.clock.Clock"
NO_CALLBACKS = ("callbacks=[]", "default_callbacks=none", "checkpoint=at_end")


@dataclass(frozen=True)
class Driven:
    """What a run took, in seconds per update.

    Attributes:
        bare: Until its last update was done and logged.
        computed: What the processor has worked for the training thread by then.
        per_update: Until its last checkpoint was on the disk.
        per_update_closed: Until all its metrics were sent and the run was closed.
        paths: Its files.
    """

    bare: float
    computed: float
    per_update: float
    per_update_closed: float
    paths: PathProvider


def drive(folder: Path, *overrides: str, more: Mapping[str, Any] | None = None) -> Driven:
    """Do a run and measure its training.

    Args:
        folder: Output folder; runs of one folder share MLflow's store.
        overrides: As on the command line.
        more: Further values by their places in the config, where there are too many for a command line.

    Raises:
        BaseException: What the run failed with.
    """
    config = compose_config([*overrides, CLOCK, f"output_dir={folder}"])
    with open_dict(config):
        for path, value in (more or {}).items():
            OmegaConf.update(config, path, value, force_add=True)
    outcome = run(check_config(config), Launch("benchmark", list(overrides)), console=Console(file=io.StringIO()))
    end = perf_counter()
    if outcome.error is not None:
        raise outcome.error
    paths = PathProvider(OutputPaths(folder).output_dir, outcome.run_id)
    clock = json.loads((paths.run_dir / "clock.json").read_text())
    bare, stop, closed = (((at - clock["start"]) / clock["updates"]) for at in (clock["trained"], clock["stop"], end))
    return Driven(bare, clock["computed"] / clock["updates"], stop, closed, paths)
