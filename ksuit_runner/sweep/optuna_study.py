"""The Optuna study of a search: an SQLite file in the sweep's folder, which processes on this machine share."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ksuit_runner.errors import ConfigError
from ksuit_runner.metric_property import Direction
from ksuit_runner.paths import SweepPaths

if TYPE_CHECKING:
    import optuna

PRUNED_AT = "pruned_at"
"""Attribute of a trial that a callback has ended early: the update at which it did."""


def require_optuna(place: str) -> None:
    """Check that Optuna is installed.

    Raises:
        ConfigError: It is not there; begins with the place of the config that asks for it.
    """
    if find_spec("optuna") is None:
        raise ConfigError("'optuna' is not installed. pip install 'ksuit_runner[optuna]'", path=place)


def open_study(paths: SweepPaths, direction: Direction, pruner: Any = None) -> optuna.Study:
    """Open the study of a sweep; the first time it is created.

    Args:
        paths: Files of the sweep.
        direction: Which direction of the objective is the better one.
        pruner: Optuna's pruner, for those who report values.
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
    """Return Optuna's TPE sampler for one trial: what it suggests depends on the seed, the number and the past only.

    A sampler that is kept draws one number after the other, and would begin anew after a resume.

    Source: Bergstra et al., "Algorithms for Hyper-SweepParameter Optimization", NIPS 2011.

    Args:
        seed: Seed of the search.
        number: Number of the trial.
        samples: How many trials there are to be; a third of them, 10 at most, is drawn at random.
    """
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=max(1, min(10, samples // 3)), multivariate=True
        )
