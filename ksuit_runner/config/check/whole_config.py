"""Checks a composed config before anything heavy is imported, so that a mistake ends within a second or two.

Nothing that the config names is imported: what it asks for is read from its source. What the source does not
tell passes here and is checked by the factory, with the same rules, when it is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ksuit_runner.config.check.initialization import initialization_of
from ksuit_runner.config.check.mismatch import mismatch
from ksuit_runner.config.check.objects import ObjectChecker, misspelt_target
from ksuit_runner.config.check.ranks import with_parts
from ksuit_runner.config.check.references import (
    check_dataset_keys,
    check_intervals,
    check_metric_keys,
    check_tags,
)
from ksuit_runner.config.check.shared_metrics import check_shared_metrics
from ksuit_runner.config.check.signature import SignatureReader
from ksuit_runner.config.flatten import nodes
from ksuit_runner.config.groups import choices, files, hint_of_choice
from ksuit_runner.config.schema import LATER_VALUES, OBJECT_SPECS, VALUES
from ksuit_runner.config.targets import Trust, check_values
from ksuit_runner.errors import ConfigError, short, suggest


def check_config(
    config: DictConfig, reader: SignatureReader | None = None, trust: Trust | None = None, is_stored: bool = False
) -> dict[str, Any]:
    """Check a whole config; imports neither torch nor MLflow nor any target.

    Args:
        config: The composed config of a run.
        reader: Caches the signatures that it has read; a sweep passes the same one for all of its jobs.
        trust: Limits of a config that was not composed here.
        is_stored: Whether it is that of a stored run, whose checkpoints may have tags already.

    Returns:
        The config as plain values, with all interpolations resolved, and the parts of a batch as a number.

    Raises:
        ConfigError: The first mistake found: ``PATH: what is wrong``, with the nearest valid name.
    """
    values = resolve(config)
    try:
        return _checked(values, ObjectChecker(reader, trust), is_stored)
    except ConfigError as error:
        error.args = (f"{error}{_origin(config, error.path)}",)
        raise


def _checked(values: dict[str, Any], checker: ObjectChecker, is_stored: bool) -> dict[str, Any]:
    check_values(values)
    _check_values(values)
    values = with_parts(values)
    _check_objects(values)
    initialization_of(values)
    for key in dict.fromkeys(pattern.split(".")[0] for pattern in OBJECT_SPECS):
        checker.walk(key, values.get(key))
    data = values.get("data")
    for item in checker.objects:
        check_intervals(item)
        if isinstance(data, Mapping) and isinstance(data.get("datasets"), Mapping):
            check_dataset_keys(item, data["datasets"])
    check_metric_keys(checker.objects, values.get("objective"), values.get("trainer"))
    check_shared_metrics(checker.objects, values.get("trainer"))
    if not is_stored:
        check_tags(checker.objects)
    return values


def resolve(config: DictConfig) -> dict[str, Any]:
    """Return a config as plain values, with all interpolations resolved.

    Raises:
        ConfigError: A value is missing (``???``), or an interpolation cannot be resolved.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _unresolved(config, error) from None
    except RecursionError:
        raise ConfigError("the config is nested too deep") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _origin(config: DictConfig, path: str | None) -> str:
    """Return a line that says of which other values a wrong one is made; nothing if the config has it as it is."""
    *parents, key = (path or "").split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or key not in node or not OmegaConf.is_interpolation(node, key):
        return ""
    plain = OmegaConf.to_container(node)
    assert isinstance(plain, dict)
    return f"\nIts value is that of {plain[key]}: change it there, or here."


def _check_values(values: Mapping[str, Any]) -> None:
    if missing := [key for key in VALUES if key not in values]:
        raise ConfigError("it is missing; what has no value is null", path=missing[0])
    check_plain_values(values)


def check_plain_values(values: Mapping[str, Any]) -> None:
    """Check those that are there of the plain values at the top of a config.

    Raises:
        ConfigError: One of them is of another kind, or a tag has a comma.
    """
    for key, annotation in (VALUES | LATER_VALUES).items():
        problem = mismatch(values[key], annotation) if key in values else None
        if problem is not None:
            raise ConfigError(problem, path=key)
    tags = values.get("tags") or ()
    for tag in [tags] if isinstance(tags, str) else tags:
        if "," in str(tag):
            raise ConfigError(
                f"a tag has no comma, which separates tags: {short(tag)}. Several: tags=[a,b]", path="tags"
            )


def _check_objects(values: Mapping[str, Any]) -> None:
    for pattern, spec in OBJECT_SPECS.items():
        if not pattern.endswith(".*"):
            if values.get(pattern) is None and not spec.optional:
                raise ConfigError("an object with a _target_ is needed, and there is none", path=pattern)
            continue
        parent = pattern.removesuffix(".*")
        value: Any = values
        for part in parent.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not isinstance(value, Mapping):
            hint = hint_of_choice(parent, value)
            raise ConfigError(f"a mapping from names to objects is needed, not {short(value)}{hint}", path=parent)
        if isinstance(value, Mapping) and isinstance(value.get("_target_"), str) and not _may_be_alone(parent):
            raise ConfigError(_without_name(parent), path=f"{parent}._target_")
        if dotted := next((key for key in value or () if "." in str(key)), None):
            raise ConfigError(f"the name '{dotted}' has a dot, which separates the parts of a config path", path=parent)
        if not spec.beside:
            _check_names(parent, value or {})


def _check_names(parent: str, objects: Mapping[str, Any]) -> None:
    """Check that settings of an object that has a name are those of one that is there."""
    there = {name for name, node in objects.items() if isinstance(node, Mapping) and "_target_" in node}
    for name, node in objects.items():
        if name in there or not isinstance(node, Mapping) or misspelt_target(node):
            continue
        near, choice = suggest(name, there), suggest(name, choices(parent))
        hint = "A new object needs a _target_, which names its class"
        if near or choice:
            hint = f"Did you mean '{near or choice}'?"
        if choice and choice not in there and (choice == name or not near):
            choose = f"`- override /{parent}: [..., {choice}]` in a file, '+{parent}={choice}' on the command line"
            hint = f"To choose conf/{parent}/{choice}.yaml: {choose}"
        raise ConfigError(f"there is no such object whose settings these could be. {hint}", path=f"{parent}.{name}")


def _may_be_alone(parent: str) -> bool:
    """Whether a config path that may hold several objects by name may also hold one without."""
    return parent in OBJECT_SPECS or "*" in parent


def _without_name(parent: str) -> str:
    """Say that an object stands where names of objects are needed, and in which file, if it is one of the group."""
    written = (path for choice in choices(parent) for path in files(f"{parent}/{choice}"))
    is_without = re.compile(r"^_target_:", re.MULTILINE)
    found = next((path for path in written if is_without.search(path.read_text("utf-8", errors="replace"))), None)
    name = found.stem if found else "NAME"
    where = f"conf/{parent}/{found.name}" if found else "the config"
    return f"the name of the object is missing: {where} needs the line `{name}:`, and everything else indented below it"


def _unresolved(config: DictConfig, error: OmegaConfBaseException) -> ConfigError:
    """Say which value is missing or cannot be resolved, and which key it may have meant."""
    path = str(error.full_key)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError("a value is needed instead of '???'", path=path)
    reason = str(error).splitlines()[0]
    if variable := re.search(r"Environment variable '(.+)' not found", reason):
        return ConfigError(
            f"the environment variable '{variable[1]}' is not set. With a default: ${{oc.env:{variable[1]},VALUE}}",
            path=path,
        )
    name = re.search(r"Interpolation key '(.+)' not found", reason)
    tree = OmegaConf.to_container(config)
    assert isinstance(tree, dict)
    near = get_close_matches(name[1], [key for key, _ in nodes(tree) if key != path], 1) if name else []
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return ConfigError(f"cannot resolve '{error.child_node}': {reason}.{hint}", path=path)
