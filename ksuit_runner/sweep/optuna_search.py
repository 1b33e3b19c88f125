"""Search with Optuna: it suggests one job after the other, and learns from how they end."""

from collections.abc import Iterator
from functools import cached_property
from math import isnan
from typing import Any

from omegaconf import OmegaConf

from ksuit_runner.config.factory import Factory
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.paths import SweepPaths
from ksuit_runner.recorder.tracker import open_tracker
from ksuit_runner.sweep.job_config import JobComposer
from ksuit_runner.sweep.job_status import read_metrics
from ksuit_runner.sweep.leaderboard import shown_metrics
from ksuit_runner.sweep.optuna_study import PRUNED_AT, open_study, sampler
from ksuit_runner.sweep.parameters import SweepParameter, read_parameters
from ksuit_runner.sweep.plan import Job, SweepPlan, add_job, read_jobs
from ksuit_runner.system.optional_package import require_package
from ksuit_runner.tracker.base import BaseTracker, EndStatus


class OptunaSearch:
    """Jobs from Optuna's ask and tell; trial ``n`` of the study is job ``n``.

    Every trial is asked for with a sampler of its own seed, so an interrupted search suggests the same trials as an
    uninterrupted one, as long as its jobs run one after another. A failed job's trial stays open, because a resume may
    retry it; the sampler learns nothing from it.

    Args:
        paths: Files of the sweep.
        plan: Its plan.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, paths: SweepPaths, plan: SweepPlan) -> None:
        require_package("optuna", path="sweep.method")
        self._paths = paths
        self._plan = plan
        config = OmegaConf.create(plan.base)
        config.output_dir = str(paths.output_dir)
        self._factory = Factory(config)
        self._properties = self._factory.build("metric_property_provider", MetricPropertyProvider)
        assert plan.objective is not None
        self._objective = plan.objective

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs that are stored already, then new ones, each when there is room for it."""
        known = read_jobs(self._paths)
        yield from known
        settings = self._plan.settings
        assert settings.samples is not None
        composer = JobComposer(self._plan.fixed)
        parameters = read_parameters(settings.params, settings.seed)
        for number in range(len(known), settings.samples):
            self._study.sampler = sampler(settings.seed, number, settings.samples)
            trial = self._trial(number)
            combination = {item.key: _suggest(trial, item) for item in parameters}
            job = composer.job(combination, number)
            _inform_callbacks(job.config, self._paths.sweep_id, number)
            add_job(self._paths, job)
            yield job

    def job_ended(self, job: Job, status: str, run_id: str | None) -> None:
        """Report the result of a finished job to Optuna."""
        trial = self._study.get_trials(deepcopy=False)[job.index]
        if status != EndStatus.FINISHED or run_id is None or trial.state.is_finished():
            return
        import optuna

        if PRUNED_AT in trial.user_attrs:
            self._study.tell(job.index, state=optuna.trial.TrialState.PRUNED)
            return
        metrics = read_metrics(self._paths, run_id, self._properties, self._tracker, self._objective)
        value = shown_metrics(metrics, self._objective, self._plan.settings.value).get(self._objective)
        if value is None or isnan(value):
            self._study.tell(job.index, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(job.index, value)

    def pruned(self) -> frozenset[int]:
        """Return the numbers of the jobs that a callback stopped early."""
        if not self._paths.study.is_file():
            return frozenset()
        trials = self._study.get_trials(deepcopy=False)
        return frozenset(trial.number for trial in trials if PRUNED_AT in trial.user_attrs)

    @cached_property
    def _study(self) -> Any:
        return open_study(self._paths, self._properties.direction(self._objective))

    @cached_property
    def _tracker(self) -> BaseTracker:
        return open_tracker(self._factory, self._paths)

    def _trial(self, number: int) -> Any:
        """Ask for a trial, or load the one that was asked for before the process was killed."""
        import optuna

        trials = self._study.get_trials(deepcopy=False)
        if number < len(trials):
            return optuna.trial.Trial(self._study, trials[number]._trial_id)
        return self._study.ask()


def _suggest(trial: Any, parameter: SweepParameter) -> str:
    """Let Optuna choose a value, and return it as the text of an override."""
    interval = parameter.interval
    if interval is None:
        return str(trial.suggest_categorical(parameter.key, list(parameter.values)))
    if interval.whole:
        return str(trial.suggest_int(parameter.key, int(interval.low), int(interval.high), log=interval.log))
    return repr(trial.suggest_float(parameter.key, interval.low, interval.high, log=interval.log))


def _inform_callbacks(config: dict[str, Any], study: str, trial: int) -> None:
    """Set study and trial of the run in the config of callbacks that have these arguments."""
    for node in config["callbacks"].values():
        if "study" in node and "trial" in node:
            node.update(study=study, trial=trial)
