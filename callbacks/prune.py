"""Pruning of runs in an Optuna search."""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.metric import MetricCallback
from ksuit_runner.config.types import NonNegativeInt, PositiveInt, check_numbers
from ksuit_runner.errors import StopTraining
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.sweep.optuna_study import PRUNED_AT, open_study
from ksuit_runner.system.optional_package import require_package


class Prune(MetricCallback):
    """Stops training when the best value of a metric is worse than the median of the finished trials at that update.

    Only runs of a search (``sweep.method=tpe``) are pruned; the search sets the trial. The past values are in the
    study, so the callback has no state of its own, and a resumed run decides the same.

    Source: the median stopping rule of Golovin et al., "Google Vizier", KDD 2017.

    Args:
        path_provider: Paths of the run, beside which the study is.
        min_trials: Number of finished trials before which no run is pruned.
        min_updates: Number of updates before which no run is pruned.
        study: Id of the sweep; the search sets it.
        trial: Number of the trial; the search sets it.
        **kwargs: Passed on to MetricCallback.

    Raises:
        ConfigError: A number is out of its range, or Optuna is missing.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        path_provider: PathProvider,
        min_trials: PositiveInt = 5,
        min_updates: NonNegativeInt = 0,
        study: str | None = None,
        trial: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveInt", min_trials=min_trials)
        check_numbers("NonNegativeInt", min_updates=min_updates)
        require_package("optuna", path=f"callbacks.{self.display_name}")
        self.min_trials = min_trials
        self.min_updates = min_updates
        self.paths = SweepPaths(path_provider.output_dir, study) if study is not None else None
        self.number = trial
        self._study: Any = None

    def _process_value(self, value: float) -> None:
        if self.paths is None or self.number is None:
            return
        world = self.data_container.world
        # One rank reports to the study and asks it: it may have changed when the next one does.
        if world.broadcast(self._is_worse(value, self.paths, self.number) if world.records else None):
            raise StopTraining(f"{self.metric_key} is {value:.4g}, worse than the median of the finished trials")

    def _is_worse(self, value: float, paths: SweepPaths, number: int) -> bool:
        """Report a value to the study, and return whether the run is to be pruned."""
        import optuna

        if self._study is None:
            pruner = optuna.pruners.MedianPruner(self.min_trials, self.min_updates)
            direction = self.metric_property_provider.direction(self.metric_key)
            self._study = open_study(paths, direction, pruner)
        known = self._study.get_trials(deepcopy=False)[number]
        update = self.trainer.counter.update
        if known.state.is_finished():  # the run was resumed after the search
            return False
        if update < max(known.intermediate_values, default=0):  # computed again after a resume: not pruned
            return False
        trial = optuna.trial.Trial(self._study, known._trial_id)
        if update not in known.intermediate_values:
            trial.report(value, update)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from numpy, for a trial with nothing but NaN
            is_worse = trial.should_prune()
        if is_worse:
            trial.set_user_attr(PRUNED_AT, update)
        return bool(is_worse)
