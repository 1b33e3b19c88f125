"""The Optuna study of a search: an SQLite file in the sweep's folder, which processes on this machine share."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ksuit_runner.metric_property import Direction
from ksuit_runner.paths import SweepPaths

if TYPE_CHECKING:
    import optuna

PRUNED_AT = "pruned_at"
"""Attribute of a trial that a callback stopped early: the update at which it did."""


def open_study(paths: SweepPaths, direction: Direction, pruner: Any = None) -> optuna.Study:
    """Open the study of a sweep, or create it.

    Args:
        paths: Files of the sweep.
        direction: Which direction of the objective is better.
        pruner: Optuna's pruner, for callers that report values.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=f"sqlite:///{paths.study}",
        study_name=paths.sweep_id,
        direction="maximize" if direction == "higher" else "minimize",
        pruner=pruner,
        load_if_exists=True,
    )


def sampler(seed: int, number: int, samples: int) -> Any:
    """Return Optuna's TPE sampler for one trial: what it suggests depends only on seed, number and earlier trials.

    One sampler for all trials has a state, which a resume would lose.

    Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NIPS 2011.

    Args:
        seed: Seed of the search.
        number: Number of the trial.
        samples: Number of trials of the search; a third of them, 10 at most, is drawn at random.
    """
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=max(1, min(10, samples // 3)), multivariate=True
        )
