"""The values of a config by which runs are compared."""

from collections.abc import Mapping
from typing import Any

from ksuit_runner.config.flatten import flatten

_TARGET = "_target_"
_KINDS = ("model", "loss", "optimizer", "schedule")
_COMPUTED = ("seed", "evaluation", "weight_decay_schedule", "initialize", "callbacks", "trainer", *_KINDS, "data")
"""Keys at the top of a config that say what is computed; all others say where, and how it is recorded."""


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run computes, by config path: what was chosen of each group, and the values that are set.

    Args:
        config: The config of a run.

    Returns:
        The names of classes, such as ``model`` -> ``Cnn``, and of callbacks, ``data`` -> the class of the training set,
        and all values that are neither null, nor empty, nor the path of a class.
    """
    chosen = {key: _name(config.get(key)) for key in _KINDS}
    chosen["data"] = _name(_training_set(config.get("data")))
    chosen["callbacks"] = ", ".join(config.get("callbacks") or ())
    values = flatten({key: config[key] for key in _COMPUTED if key in config})
    set_here = {
        path: value
        for path, value in values.items()
        if value not in (None, {}, []) and path.rpartition(".")[2] != _TARGET
    }
    return {key: name for key, name in chosen.items() if name} | set_here


def _name(node: Any) -> str:
    """Return the name of the class or function that a node is built with; empty for none."""
    return str(node.get(_TARGET, "")).rpartition(".")[2] if isinstance(node, Mapping) else ""


def _training_set(data: Any) -> Any:
    datasets = data.get("datasets") if isinstance(data, Mapping) else None
    return datasets.get(data.get("train", "train")) if isinstance(datasets, Mapping) else None
