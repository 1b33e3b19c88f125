"""The values of a config by which runs are compared."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from ksuit_runner.config.flatten import flatten
from ksuit_runner.config.groups import choices, files

_TARGET = "_target_"
_KINDS = ("model", "loss", "optimizer", "schedule")
_COMPUTED = ("seed", "evaluation", "weight_decay_schedule", "initialize", "callbacks", "trainer", *_KINDS, "data")
"""Keys at the top of a config that say what is computed; all others say where, and how it is recorded."""


def named_choices(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, str]:
    """Return those choices of groups that say what a run computes: not if the config names another class by now.

    Args:
        config: The config of the run.
        chosen: What was chosen when it was composed, such as ``model`` -> ``cnn``; other keys do not count.
    """
    names, found = _class_names(config), {}
    for group, name in names.items():
        if (choice := chosen.get(group)) in choices(group):
            node: Any = OmegaConf.to_container(OmegaConf.load(files(f"{group}/{choice}")[0]))
            if _class_names({group: node, **node})[group] in ("", name):
                found[group] = str(choice)
    return found


def comparable(config: Mapping[str, Any], named: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what a run computes, by config path: what was chosen of each group, and the values that are set.

    Args:
        config: The config of a run.
        named: What ``named_choices`` has returned for it.

    Returns:
        What was chosen, such as ``model`` -> ``cnn``, or else the names of classes, ``data`` -> that of the training
        set; names of callbacks; and all values that are neither null, nor empty, nor the path of a class.
    """
    chosen = {**_class_names(config), **(named or {})}
    chosen["callbacks"] = ", ".join(config.get("callbacks") or ())
    values = flatten({key: config[key] for key in _COMPUTED if key in config})
    set_here = {
        path: value
        for path, value in values.items()
        if value not in (None, {}, []) and path.rpartition(".")[2] != _TARGET
    }
    return {key: name for key, name in chosen.items() if name} | set_here


def _class_names(config: Mapping[str, Any]) -> dict[str, str]:
    return {**{key: _name(config.get(key)) for key in _KINDS}, "data": _name(_training_set(config.get("data")))}


def _name(node: Any) -> str:
    """Return the name of the class or function that a node is built with; empty for none."""
    return str(node.get(_TARGET, "")).rpartition(".")[2] if isinstance(node, Mapping) else ""


def _training_set(data: Any) -> Any:
    datasets = data.get("datasets") if isinstance(data, Mapping) else None
    return datasets.get(data.get("train", "train")) if isinstance(datasets, Mapping) else None
