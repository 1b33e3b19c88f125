"""The Python API: runs as from the command line, in a script, a test or a notebook."""

from __future__ import annotations

import base64
import copy
import io
import logging
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import Container, DictConfig, OmegaConf

from ksuit_runner.cli.arguments import COMMANDS, check_overrides
from ksuit_runner.cli.start import refuse_launcher, start_composed, start_new, start_stored
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import ASKS_HYDRA, compose_config, forget_locations, without_sweep
from ksuit_runner.config.overrides import value_of
from ksuit_runner.config.schema import OBJECT_SPECS
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.errors import ConfigError, KsuitError, files_explained
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.mode import OF_STORED_RUNS
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.resume.request import as_single, refuse_sweep_settings, requested
from ksuit_runner.security.masking import mask_text
from ksuit_runner.system.project_imports import project_imports
from ksuit_runner.system.signals import TIME_IS_UP
from ksuit_runner.ui.notebook import NotebookPicture, in_notebook

if TYPE_CHECKING:
    from ksuit_runner.metric_property import Summary
    from ksuit_runner.sweep.leaderboard import Row
    from ksuit_runner.sweep.runner import SweepOutcome

_MULTIRUN = ("-m", "--multirun")
_RUNNING = Lock()


@dataclass(frozen=True)
class RunResult:
    """The result of a run or a sweep. A notebook shows it as a table, with a picture of the metrics.

    Attributes:
        run_id: Its id; for a sweep, that of the parent run.
        status: FINISHED, FAILED or KILLED. ``evaluate=`` does not change the status of a run.
        folder: Folder of its files.
        metrics: Last and best value of each metric by key, each with its update; empty for a sweep.
        jobs: The runs of a sweep, ranked as in its leaderboard; empty for a run.
    """

    run_id: str
    status: str
    folder: Path
    metrics: Mapping[str, Summary] = field(default_factory=dict)
    jobs: tuple[Row, ...] = ()

    def _repr_html_(self) -> str:
        import pandas as pd

        rows: Sequence[Any] = [{"metric": key, **asdict(metric)} for key, metric in self.metrics.items()]
        if self.jobs:
            rows = [{"job": row.index + 1, **row.values, **row.metrics, "status": row.status} for row in self.jobs]
        head = f"<b>{self.status.lower()}</b> <code>{self.run_id}</code>"
        table: str = pd.DataFrame(rows).to_html(index=False, na_rep="", float_format="{:.4g}".format)
        picture = base64.b64encode(self._picture() or b"").decode()
        # part of the text, as a notebook shows either a text or a picture
        return head + table + (f'<img src="data:image/png;base64,{picture}">' if picture else "")

    def _picture(self) -> bytes | None:
        """Return a PNG: the metrics with a better direction over the updates; the plot of a sweep's leaderboard.

        None if there is none, or the cell of a notebook shows it already, as it was drawn while the run trained.
        """
        from ksuit_runner.reports.curves import curves
        from ksuit_runner.reports.facts import StoredRun
        from ksuit_runner.ui.figure_text import save_figure

        if self.jobs:
            plot = self.folder / "leaderboard.png"
            return plot.read_bytes() if plot.is_file() else None
        if NotebookPicture.is_below_cell(self.run_id):
            return None
        stored = StoredRun(PathProvider(self.folder.parent.parent, self.run_id))
        drawn = [
            key
            for key, metric in stored.metrics.items()
            if metric.direction != "neutral" and len(stored.points[key]) > 1
        ]
        if (figure := curves([stored.name], [stored.points], drawn)) is None:
            return None
        content = io.BytesIO()
        save_figure(figure, content)
        return content.getvalue()


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose a config as the command line does. It can be changed, and passed to ``run``.

    A key that the config does not have cannot be set by mistake, as ever with Hydra: ``omegaconf.open_dict`` allows it.
    Names of callbacks and of datasets are free.

    Args:
        overrides: Overrides of the defaults, such as ``["model=mlp", "optimizer.lr=3e-4"]``.

    Raises:
        ConfigError: An override names nothing that exists, or has no meaning.
    """
    check_overrides(_texts(overrides))
    config = compose_config(overrides)
    _look_up_hydra(config, OmegaConf.to_container(config))
    named = [pattern for pattern, spec in OBJECT_SPECS.items() if pattern.endswith(".*") and not spec.beside]
    for pattern in named:
        if isinstance(node := OmegaConf.select(config, pattern.removesuffix(".*")), DictConfig):
            OmegaConf.set_struct(node, False)
    return config


def run(what: Sequence[str] | Mapping[str, Any] | DictConfig) -> RunResult:
    """Execute a run, or a sweep, as the command line does, and return its result.

    Random generators, signal handlers and logging of the process are restored at the end. In the main thread a signal
    ends the run with a checkpoint, and is then raised again: Ctrl-C becomes a KeyboardInterrupt. In a notebook, a run
    that was interrupted is KILLED, and returned, as is one whose time is up (``callbacks.stop_at.max_time``); a second
    interrupt raises KeyboardInterrupt. In another thread no signal reaches the run.

    Args:
        what: Overrides, as on the command line: ``["model=mlp", "callbacks=[ema,accuracy]"]``, ``["resume=last"]``,
            ``["evaluate=last"]``, ``["sweep=seeds"]`` or ``["-m", "seed=0,1"]``. Or a config: what ``compose`` returns.

    Raises:
        ConfigError: There is a mistake in the config or the overrides; nothing was created.
        KsuitError: It could not be started; or another run is under way in this process.
        Exception: What training or a callback raised. The run is FAILED, and can be resumed.
    """
    if not _RUNNING.acquire(blocking=False):
        raise KsuitError(
            "another run is under way in this process, and they would share the random generators. "
            "To train several at once: run(['-m', ..., 'launcher=joblib']), or a process for each"
        )
    try:
        with _guest():
            outcome = _start(what)
    finally:
        _RUNNING.release()
    returns = outcome.signal == TIME_IS_UP or (outcome.signal == signal.SIGINT and in_notebook())
    if outcome.signal is not None and not returns:
        signal.raise_signal(outcome.signal)
    return _result(outcome)


def _start(what: Sequence[str] | Mapping[str, Any] | DictConfig) -> RunOutcome | SweepOutcome:
    if isinstance(what, Mapping | DictConfig):
        config = copy.deepcopy(what) if isinstance(what, DictConfig) else OmegaConf.create(dict(what))
        _refuse_requests(config)
        refuse_launcher(config, str(OmegaConf.select(config, "launcher._target_")))
        return start_new(check_config(without_sweep(config)), Launch("ksuit_runner.run(config)", []))
    given = list(_texts(what))
    command = mask_text(f"ksuit_runner.run({given})")
    overrides = [item for item in given if item not in _MULTIRUN]
    if flags := [item for item in overrides if item.startswith("-")]:
        raise ConfigError(f"{flags[0]}: from Python, -m is the only flag")
    check_overrides(overrides)
    for name in COMMANDS:
        if value_of(name, overrides):
            raise ConfigError(f"{name}=: not for run(), only for the command line: ksuit-runner {name}=...")
    request, choice, has_flag = requested(overrides), value_of("sweep", overrides), len(overrides) < len(given)
    if request is not None:
        if has_flag or choice:
            raise ConfigError(f"{request}: it cannot be given together with {'-m' if has_flag else f'sweep={choice}'}")
        return start_stored(request, overrides, command)
    overrides = as_single(overrides)
    if has_flag or choice:
        from ksuit_runner.sweep.commands import start_sweep

        with files_explained():
            return start_sweep(overrides, command)
    refuse_sweep_settings(overrides)
    return start_composed(compose_config(overrides), command)


def _texts(overrides: Sequence[str]) -> Sequence[str]:
    if isinstance(overrides, str) or not all(isinstance(item, str) for item in overrides):
        raise ConfigError(f"overrides are a list of texts, such as ['model=mlp'], not {overrides!r:.80}")
    return overrides


def _refuse_requests(config: DictConfig) -> None:
    asked = [key for key in (*OF_STORED_RUNS, *COMMANDS) if config.get(key) is not None]
    if asked:
        raise ConfigError(f"{asked[0]}: a config is for a new run. As an override: run(['{asked[0]}=...'])")
    if OmegaConf.select(config, "sweep.params"):
        raise ConfigError("a config is for one run. A sweep is started by run(['sweep=NAME'])", path="sweep")


def _look_up_hydra(node: Any, raw: Any) -> None:
    """Resolve what refers to Hydra (``${hydra:...}``) while Hydra knows this config."""
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        if isinstance(value, str) and ASKS_HYDRA.search(value):
            node[key] = node[key]
        elif isinstance(value, dict | list) and isinstance(node[key], Container):
            _look_up_hydra(node[key], value)


@contextmanager
def _guest() -> Iterator[None]:
    """Import from the working directory, read YAML files anew, and restore the process after."""
    forget_locations()
    known, drawn = HydraConfig.instance().cfg, random.getstate()
    logger = logging.getLogger("ksuit_runner")
    level = logger.level
    try:
        with project_imports():
            yield
    finally:
        logger.setLevel(level)
        HydraConfig.instance().cfg = known
        random.setstate(drawn)  # some packages draw from it when they are imported


def _result(outcome: RunOutcome | SweepOutcome) -> RunResult:
    if not isinstance(outcome, RunOutcome):
        return RunResult(outcome.run_id, outcome.status.value, outcome.folder, jobs=tuple(outcome.jobs))
    if isinstance(outcome.error, SystemExit):  # which would end the caller, and with status 0 perhaps
        raise KsuitError(f"the run called sys.exit({outcome.error.code!r}) and has failed") from outcome.error
    if outcome.error is not None:
        raise outcome.error
    metrics = {key: replace(summary) for key, summary in outcome.summary.items()}
    return RunResult(outcome.run_id, outcome.status.value, outcome.folder, MappingProxyType(metrics))
