"""Checks the objects of a config one by one: the target, its kind, and the names and types of the arguments."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from ksuit_runner.config.check.mismatch import mismatch
from ksuit_runner.config.check.signature import Signature, SignatureReader
from ksuit_runner.config.groups import choices, files, hint_of_choice
from ksuit_runner.config.schema import (
    INJECTED,
    OBJECT_SPECS,
    SPECIAL_KEYS,
    ObjectSpec,
    TargetParameter,
    bind,
    check_injected,
    objects_beside,
    settings_in,
    spec_at,
    takes_functions,
)
from ksuit_runner.config.targets import Trust, check_function, check_module, check_name
from ksuit_runner.errors import ConfigError, short, suggest

_NESTED = ObjectSpec(kind=None)


@dataclass(frozen=True)
class CheckedObject:
    """An object of the config whose own arguments are in order.

    Attributes:
        path: Its config path.
        target: Its ``_target_``.
        signature: What its target takes; None if the source does not tell.
        given: Its arguments from the config.
    """

    path: str
    target: str
    signature: Signature | None
    given: Mapping[str, Any]

    @property
    def parameters(self) -> tuple[TargetParameter, ...]:
        """The parameters of its target, as far as they are known."""
        return self.signature.parameters if self.signature else ()

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Its arguments with the defaults of those not given; UNKNOWN for a default that is not a plain value."""
        return {item.name: item.default for item in self.parameters} | dict(self.given)


class ObjectChecker:
    """Walks through a config and checks every object in it.

    Args:
        reader: Reads signatures from source, each once.
        trust: Limits of a config that was not composed here.

    Attributes:
        objects: What was checked, in the order of the walk.
    """

    def __init__(self, reader: SignatureReader | None = None, trust: Trust | None = None) -> None:
        self.objects: list[CheckedObject] = []
        self._reader = reader or SignatureReader()
        self._trust = trust

    def walk(self, path: str, value: Any, is_argument: bool = False) -> None:
        """Check the value at a config path, and everything below it.

        Args:
            path: Its config path.
            value: The value.
            is_argument: Whether it is an argument of the object above it.

        Raises:
            ConfigError: Something is wrong with an object; carries its config path.
        """
        expected = spec_at(path)
        beside = objects_beside(path, value)
        is_object = isinstance(value, Mapping) and ("_target_" in value or (expected and expected.instead))
        if expected and ((expected.beside and not is_object) or (expected.instead and is_argument)):
            expected = None  # an argument
        if beside and "_target_" not in value and (len(beside) == len(value) or _are_several(path)):
            self._walk_all((f"{path}.{key}", item) for key, item in value.items())
        elif expected and not (value is None and expected.optional):
            self._check(path, value, expected)
        elif isinstance(value, Mapping) and "_target_" in value:
            self._check(path, value, _NESTED)
        elif isinstance(value, Mapping):
            if typo := misspelt_target(value):
                raise ConfigError("there is no such key here. Did you mean '_target_'?", path=f"{path}.{typo}")
            self._walk_all((f"{path}.{key}", item) for key, item in value.items())
        elif isinstance(value, list):
            self._walk_all((f"{path}[{index}]", item) for index, item in enumerate(value))

    def _walk_all(self, items: Iterable[tuple[str, Any]]) -> None:
        for path, value in items:
            self.walk(path, value)

    def _check(self, path: str, node: Any, expected: ObjectSpec) -> None:
        target = _target(path, node)
        try:
            if self._trust is not None:
                self._trust.check_name(path, target)
            signature = self._reader.read(target)
        except ConfigError as error:
            error.locate(f"{path}._target_")
            raise
        beside = objects_beside(path, node)
        settings = settings_in(path, node) if expected is not _NESTED else {}
        given = {str(key): value for key, value in node.items() if key not in (*SPECIAL_KEYS, *beside, *settings)}
        injected = INJECTED[expected.injects]
        if signature is None:
            bind(path, (), given, injected, any_name=True)
        else:
            _check_kind(path, signature, expected, self._trust)
            parameters = _to_bind(signature, node)
            if _are_several(path):
                _check_one(path, given, {parameter.name for parameter in parameters})
            if not signature.any_name:
                _check_apart(path, target, given, {parameter.name for parameter in parameters})
            wanted = bind(path, parameters, given, injected, signature.any_name)
            check_injected(path, signature.target, signature.is_class, wanted, expected)
            if self._trust is not None and not signature.is_class:
                _check_trust(self._trust, path, signature, bool(wanted))
            _check_types(path, parameters, given, self._reader)
        for name, value in settings.items():
            if problem := mismatch(value, expected.settings[name]):
                raise ConfigError(problem, path=f"{path}.{name}")
        self.objects.append(CheckedObject(path, target, signature, given))
        self.walk(f"{path}._args_", node.get("_args_"))
        for name in given:
            self.walk(f"{path}.{name}", node[name], is_argument=True)
        self._walk_all((f"{path}.{name}", node[name]) for name in beside)


def _check_apart(path: str, target: str, given: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that an object has not the settings of another one, as where a file without a name is chosen beside it."""
    spec, unknown = OBJECT_SPECS.get(f"{path}.*"), given.keys() - {*names}
    if not unknown or spec is None or not spec.beside or spec.instead:
        return
    keys = {name: _top_of(found[0]) for name in choices(path) if (found := files(f"{path}/{name}"))}
    alone = {name: found for name, found in keys.items() if found.get("_target_")}
    own = next((name for name, found in alone.items() if found["_target_"] == target), None)
    settings = {name: {*found} - {"_target_"} for name, found in alone.items() if name != own}
    other = next((name for name, keys in settings.items() if unknown <= keys <= given.keys()), None)
    if own and other:
        raise ConfigError(
            f"conf/{path}/{own}.yaml would take the place of {other} and get its settings. To be chosen beside others, "
            f"it needs the line `{own}:`, and everything else indented below it",
            path=path,
        )


def _top_of(file: Path) -> dict[str, str]:
    """Return the keys at the top of a YAML file, with what is behind them in their lines."""
    return dict(re.findall(r"^(\w+):[ \t]*(.*?)[ \t]*$", file.read_text("utf-8", errors="replace"), re.MULTILINE))


def _check_one(path: str, given: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that there are not both an object and several by name, as where these were meant to replace a default."""
    for name, value in given.items():
        if isinstance(value, Mapping) and "_target_" in value and name not in names:
            raise ConfigError(
                f"the config has one {path} already, {path}._target_. Several by name take its place: write "
                f"`- override /{path}: null` among the defaults of the experiment, or '~{path}' on the command line",
                path=f"{path}.{name}",
            )


def _are_several(path: str) -> bool:
    """Whether a config path may hold several objects by name instead of one."""
    spec = spec_at(f"{path}.*")
    return spec is not None and spec.instead


def misspelt_target(node: Mapping[Any, Any]) -> str | None:
    """Return the key of what may be a class, if it is almost ``_target_``."""
    return _near_target(key for key, item in node.items() if isinstance(item, str) and "." in item)


def _near_target(keys: Iterable[Any]) -> str | None:
    return next(iter(get_close_matches("_target_", [key for key in keys if isinstance(key, str)], 1, 0.8)), None)


def _target(path: str, node: Any) -> str:
    if not isinstance(node, Mapping):
        raise ConfigError(f"an object with a _target_ is needed, not {_written(node)}{_instead(path, node)}", path=path)
    if "_target_" not in node:
        if typo := _near_target(node):
            raise ConfigError("there is no such key here. Did you mean '_target_'?", path=f"{path}.{typo}")
        name = path.rpartition(".")[2]
        is_too_deep = isinstance(below := node.get(name), Mapping) and "_target_" in below
        hint = f". Its keys are one level too deep: leave out the line '{name}:' around them" if is_too_deep else ""
        raise ConfigError(f"it has no _target_, which names the class of the object{hint}", path=path)
    try:
        return check_name(node["_target_"])
    except ConfigError as error:
        error.locate(f"{path}._target_")
        raise


def _written(value: Any) -> str:
    """Return a value as it is written in YAML."""
    return "null" if value is None else short(value)


def _instead(path: str, value: Any) -> str:
    """Say what to write where a value stands for an object: how a file is chosen, or an object left out."""
    is_left_out = value is None and path.count(".") == 1
    if isinstance(value, str) and "." in value:
        return f". Its class is named by `_target_: {value}`"
    return f". Without it: '~{path}' on the command line" if is_left_out else hint_of_choice(path, value)


def _check_kind(path: str, signature: Signature, expected: ObjectSpec, trust: Trust | None) -> None:
    try:
        check_module(signature.target, signature.module)
        if not signature.is_class:
            check_function(
                signature.target, takes_functions(path), signature.module, signature.file, signature.qualname
            )
        if trust is not None:
            trust.check_definition(path, signature.target, signature.module, signature.file)
    except ConfigError as error:
        error.locate(f"{path}._target_")
        raise
    if expected.kind and signature.is_class and signature.knows_bases and expected.kind not in signature.bases:
        raise ConfigError(
            f"'{signature.target}' does not derive from {expected.kind.rpartition('.')[2]}", path=f"{path}._target_"
        )
    if signature.flaw and (expected.kind or "").startswith("ksuit_runner."):  # others have collaborators of their own
        raise ConfigError(signature.flaw, path=f"{path}._target_")


def _check_trust(trust: Trust, path: str, signature: Signature, asks: bool) -> None:
    try:
        trust.check_function(path, signature.target, signature.module, asks)
    except ConfigError as error:
        error.locate(f"{path}._target_")
        raise


def _to_bind(signature: Signature, node: Mapping[str, Any]) -> list[TargetParameter]:
    """Return the parameters that remain to be given by name."""
    parameters = list(signature.parameters[len(node.get("_args_") or ()) :])
    if node.get("_partial_"):
        return [replace(parameter, required=False) for parameter in parameters]
    return parameters


def _check_types(
    path: str, parameters: Iterable[TargetParameter], given: Mapping[str, Any], reader: SignatureReader
) -> None:
    for parameter in parameters:
        if parameter.name not in given or parameter.annotation is None:
            continue
        value = given[parameter.name]
        if value is None and parameter.default is None:
            continue
        if problem := mismatch(value, parameter.annotation):
            below = f"{path}.{parameter.name}"
            raise ConfigError(_object_hint(below, value, reader) or problem, path=below)


def _object_hint(path: str, value: Any, reader: SignatureReader) -> str | None:
    """Say how an object is written, where one is needed and a word stands for it, such as ``data.order=sequential``."""
    spec = spec_at(path)
    if not isinstance(value, str) or spec is None or spec.kind is None or spec.instead:
        return None
    named = reader.classes_of(spec.kind)
    meant = suggest(value.lower(), map(str.lower, named))
    name = next((item for item in named if item.lower() == meant), None)
    example = f"'{path}={{_target_: {spec.kind.rpartition('.')[0]}.{name or 'NAME'}}}'"
    listed = "" if name else f", where NAME is one of {', '.join(named)}"
    return f"an object is needed, not {short(value)}: {example}{listed}"
