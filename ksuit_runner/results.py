"""What is there after training, for scripts and notebooks: the model of a run, its metrics, and a table of all runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ksuit_runner.checkpoint.folders import names
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import forget_locations
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.overrides import to_text
from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.stored_run import read_shapes
from ksuit_runner.reports.facts import StoredRun, stored_runs
from ksuit_runner.resume.changes import compose_stored
from ksuit_runner.resume.reference import Reference
from ksuit_runner.resume.request import find_stored
from ksuit_runner.system.project_imports import project_imports

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

_COLUMNS = ["name", "status", "objective", "best", "took", "age", "started", "checkpoint", "mode", "tags", "notes"]


def load_model(
    run: str,
    weights: str | None = None,
    output_dir: str | os.PathLike[str] = "outputs",
    device: str | torch.device = "cpu",
    trust: Sequence[str] = (),
) -> nn.Module:
    """Return the model of a run, as the plain module that it was written as, in evaluation mode.

    It is built from the stored config, for the shapes that are stored with the run: no data is read. By default it has
    the weights that the metrics without a suffix are about, such as ``accuracy/test``: those that were trained, or, if
    the optimizer evaluates others (as schedule-free ones do), those. ``accuracy/test/ema`` is about the weights
    ``ema``, which are returned only if they are asked for, also if ``best`` was chosen by them.

    Args:
        run: A run, or one of its checkpoints: ``RUN``, ``RUN@best``, ``RUN@E2_U90_S2880``; each with or without
            ``/ema`` for other weights. A run is its id, the first 6 or more characters of it, its name, or ``last``.
        weights: Name of other weights, such as ``ema``; ``model`` or None for the trained ones, as they are evaluated.
        output_dir: Where runs are.
        device: Device that it is loaded to.
        trust: Packages whose classes a config from another user or machine may name.

    Raises:
        ResumeError: There is no such run, or several match.
        ConfigError: It has no such checkpoint or weights, or its config names what is not trusted.
        CheckpointError: The checkpoint is damaged, or does not fit the model.
    """
    overrides = [f"output_dir={to_text(os.fspath(output_dir))}", f"trust=[{','.join(trust)}]"]
    with project_imports():
        return _load(run, weights, overrides).to(device)


def _load(run: str, weights: str | None, overrides: Sequence[str]) -> nn.Module:
    from ksuit_runner.checkpoint.format import read_newest
    from ksuit_runner.engine.assembly import build_model
    from ksuit_runner.engine.stored_model import load_evaluated
    from ksuit_runner.keyed_random import undisturbed

    found = _find("load_model", run, overrides)
    name, named = found.checkpoint_and_weights()
    if named and weights not in (None, named):
        raise ConfigError(f"load_model: '{run}' names the weights '{named}', and weights says '{weights}'")
    stored = compose_stored(Mode.EVALUATE, found.paths, overrides)
    config = check_config(stored.config, trust=stored.trust, is_stored=True)
    config["output_dir"] = str(found.outputs.output_dir)
    checkpoint, shapes = read_newest(found.paths, name, holds=True), read_shapes(found.paths)

    def shape(argument: str) -> tuple[int, ...]:
        if argument not in shapes:
            raise ConfigError(f"the run has no stored {argument}; write it into the config of the model", path="model")
        return shapes[argument]

    with undisturbed():
        factory = Factory(config, stored.trust)
        model = build_model(factory, int(config["seed"]), shape)
        load_evaluated(model, factory, config, checkpoint, named or weights)
    return model.module.eval()


def metrics(run: str, output_dir: str | os.PathLike[str] = "outputs") -> pd.DataFrame:
    """Return the metrics of a run: a row for each update with a value, a column for each metric, NaN elsewhere.

    Args:
        run: The run, as in ``load_model``.
        output_dir: Where runs are.

    Raises:
        ResumeError: There is no such run, or several match.
    """
    import pandas as pd

    found = _find("metrics", run, [f"output_dir={to_text(os.fspath(output_dir))}"])
    return pd.DataFrame(StoredRun(found.paths).points).rename_axis("update").sort_index()


def runs(output_dir: str | os.PathLike[str] = "outputs") -> pd.DataFrame:
    """Return the runs of an output folder, the newest first: a row for each, under its id.

    The columns are ``name``, ``status`` (KILLED also if the process is gone without a word), ``objective`` (the metric
    that the run is judged by), ``best`` (its best value), ``took`` and ``age`` (timedeltas), ``started``,
    ``checkpoint`` (the newest), ``mode`` (train or fork), ``tags``, ``notes``, and the last value of each metric.

    Args:
        output_dir: Where runs are.
    """
    import pandas as pd

    rows = {run.paths.run_id: _row(run) for run in stored_runs(OutputPaths(os.fspath(output_dir)))}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row)) or _COLUMNS
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("run")


def _row(run: StoredRun) -> dict[str, Any]:
    last = {key: list(values.values())[-1] for key, values in run.points.items()}
    mode = run.entry.mode if run.entry is not None else None
    checkpoint = next(iter(names(run.paths)), None)
    facts = (run.name, run.status, *run.judged, run.took, run.age, run.started, checkpoint, mode, run.tags, run.notes)
    return dict(zip(_COLUMNS, facts, strict=True)) | last


def _find(function: str, run: str, overrides: Sequence[str]) -> Reference:
    forget_locations()  # in a notebook, the YAML files may have changed
    return find_stored(function, run, overrides)
