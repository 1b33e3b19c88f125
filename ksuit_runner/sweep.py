"""What a sweep is besides its runs: the run that they are grouped under, and the table at the end."""

from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from ksuit_runner.check.config import check_config
from ksuit_runner.errors import KsuitError, TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.terminal import make_console, print_error, sweep_table, sync_command


class SweepCallback(Callback):
    """Hydra calls this at the start of a sweep, after each of its runs, and at its end."""

    def __init__(self) -> None:
        self._tracker: Any = None
        self._rows: list[tuple[list[str], str, str, dict[str, float]]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Create the parent run, and have every run of the sweep told its id.

        Raises:
            SystemExit: It cannot be created. Hydra turns every other exception into a warning, and goes on.
        """
        try:
            info = self._start(config)
        except KsuitError as error:
            print_error(make_console(stderr=True), error)
            raise SystemExit(error.exit_status) from error
        with open_dict(config):
            config.hydra.overrides.task.append(f"parent_run_id={info.run_id}")
        make_console().print(f"sweep {info.name}  {info.run_id}")

    def _start(self, config: DictConfig) -> Any:
        from ksuit_runner.factory import Factory
        from ksuit_runner.tracker.base import KIND_TAG
        from ksuit_runner.tracker.deferred import DeferredTracker

        with open_dict(config):
            job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        check_config(job)
        outputs = OutputPaths(job.output_dir)
        self._tracker = DeferredTracker(Factory(job).build_tracker(outputs), outputs)
        return self._tracker.start_run(job.name or config.hydra.runtime.choices.get("sweep"), {KIND_TAG: "sweep"})

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Keep a run's result for the table."""
        if self._tracker is None:
            return
        outcome = job_return.return_value
        overrides = [item for item in job_return.overrides or [] if not item.startswith("parent_run_id=")]
        if outcome is None:  # the sweep was interrupted before
            return
        if isinstance(outcome, KsuitError):
            self._rows.append((overrides, "FAILED", "", {}))
            return
        keys = [config.objective] if config.objective else list(outcome.summary)
        values = {key: outcome.summary[key].last for key in keys if key in outcome.summary}
        self._rows.append((overrides, outcome.status, outcome.run_id, values))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Close the parent run and print the table."""
        statuses = {status for _, status, *_ in self._rows}
        self._tracker.end_run(next((status for status in ("KILLED", "FAILED") if status in statuses), "FINISHED"))
        try:
            self._tracker.deliver()
            self._tracker.deliver_end()
        except TrackerError as error:
            again = sync_command(self._tracker.run_id, OutputPaths(config.output_dir).output_dir)
            make_console(stderr=True).print(f"{error}\nTo tell the tracker that the sweep has ended: {again}")
        shared = set.intersection(*(set(row[0]) for row in self._rows)) if len(self._rows) > 1 else set()
        sweep_table(make_console(), [([item for item in row[0] if item not in shared], *row[1:]) for row in self._rows])
