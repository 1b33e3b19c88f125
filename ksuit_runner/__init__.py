"""ksuit_runner: a config-driven experiment runner for PyTorch.

What a project's own code needs can be imported from here. A name is looked up when it is first used, so that the
import of the package itself costs nothing: neither torch nor MLflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ksuit_runner.system.shipped_folders import install as _install

if TYPE_CHECKING:
    from ksuit_runner.api import RunResult, compose, run
    from ksuit_runner.callback_base import CallbackBase
    from ksuit_runner.callback_bases.feature import FeatureCallback
    from ksuit_runner.callback_bases.metric import MetricCallback
    from ksuit_runner.callback_bases.online import OnlineCallback
    from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
    from ksuit_runner.counter import Interval, UpdateCounter
    from ksuit_runner.data.container import DataContainer
    from ksuit_runner.data.tensor_dataset import TensorDataset
    from ksuit_runner.errors import ConfigError, StopTraining
    from ksuit_runner.launchers.base import Launcher
    from ksuit_runner.models.base import ModelBase
    from ksuit_runner.paths import PathProvider
    from ksuit_runner.results import load_model, metrics, runs
    from ksuit_runner.tracker.base import BaseTracker
    from ksuit_runner.trainer.sgd import SgdTrainer

__version__ = "0.1.0"

__all__ = [
    "BaseTracker",
    "CallbackBase",
    "ConfigError",
    "DataContainer",
    "DatasetCallback",
    "FeatureCallback",
    "Interval",
    "Launcher",
    "MetricCallback",
    "ModelBase",
    "OnlineCallback",
    "PathProvider",
    "PeriodicCallback",
    "RunResult",
    "SgdTrainer",
    "StopTraining",
    "TensorDataset",
    "UpdateCounter",
    "compose",
    "load_model",
    "metrics",
    "run",
    "runs",
]

_MODULES = {
    "BaseTracker": "tracker.base",
    "CallbackBase": "callback_base",
    "ConfigError": "errors",
    "DataContainer": "data.container",
    "DatasetCallback": "callback_bases.periodic",
    "FeatureCallback": "callback_bases.feature",
    "Interval": "counter",
    "Launcher": "launchers.base",
    "MetricCallback": "callback_bases.metric",
    "ModelBase": "models.base",
    "OnlineCallback": "callback_bases.online",
    "PathProvider": "paths",
    "PeriodicCallback": "callback_bases.periodic",
    "RunResult": "api",
    "SgdTrainer": "trainer.sgd",
    "StopTraining": "errors",
    "TensorDataset": "data.tensor_dataset",
    "UpdateCounter": "counter",
    "compose": "api",
    "load_model": "results",
    "metrics": "results",
    "run": "api",
    "runs": "results",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()  # processes that a run starts import this package before they need a callback
