"""The signature of a class or factory function, read from its source without importing it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import Any

from ksuit_runner.config.check.constructor import constructor, flaw, literal, parameters_of_function
from ksuit_runner.config.check.signature_lookup import Definition, MissingName, Sources
from ksuit_runner.config.check.signature_source import Function, dotted
from ksuit_runner.config.schema import UNKNOWN, TargetParameter

_ROOTS = frozenset({"object", "Generic", "Protocol", "ABC"})


@dataclass(frozen=True)
class Signature:
    """What the source of a target tells about it.

    Attributes:
        target: Dotted name that was asked for.
        module: Name of the module that it is defined in.
        file: File of that module, if it has one.
        qualname: Name inside of that module, with dots for what is nested in classes.
        is_class: Whether it is a class; else it is a function.
        parameters: What it is called with. ``**kwargs`` passed on to a base class stands for the base's parameters.
        any_name: Whether it takes arguments of other names, too, or may do so.
        bases: Dotted names of the class and its ancestors, where they are defined.
        knows_bases: Whether these are all ancestors.
        logs: Patterns of the metric keys that a callback declares, or None.
        offers: Patterns of the names of weights that it offers for evaluation, or None.
        tags: Patterns of the tags that it gives to checkpoints, or None.
        is_repeatable: Whether another callback of the class logs the same values at an update, as far as is known.
        flaw: How its constructor fails to call that of its base class; empty if it does, or the source does not tell.
    """

    target: str
    is_class: bool
    parameters: tuple[TargetParameter, ...]
    any_name: bool
    bases: frozenset[str] = frozenset()
    knows_bases: bool = True
    logs: tuple[str, ...] | None = None
    offers: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    module: str = ""
    file: str | None = None
    qualname: str = ""
    is_repeatable: bool = True
    flaw: str = ""


class SignatureReader:
    """Reads signatures; each target is read, and each source file parsed, once per reader."""

    def __init__(self) -> None:
        self._sources = Sources()
        self._known: dict[str, Signature | None] = {}

    def read(self, target: str) -> Signature | None:
        """Read the signature of a class or function.

        Args:
            target: Dotted name, ``package.module.Class``.

        Returns:
            The signature, or None where the source does not tell: a compiled or dynamically made class.

        Raises:
            ConfigError: There is no such module or name; the message has the nearest ones.
        """
        if target not in self._known:
            self._known[target] = self._signature(target)
        return self._known[target]

    def classes_of(self, kind: str) -> list[str]:
        """Return the names of the public classes that derive from one, in the module in which that is defined.

        Args:
            kind: Dotted name of the class.
        """
        name = kind.rpartition(".")[0]
        module = self._sources.module(name)
        classes = [item for item, node in module.names.items() if isinstance(node, ast.ClassDef)] if module else []
        signatures = {item: self.read(f"{name}.{item}") for item in classes if not item.startswith("_")}
        return [item for item, found in signatures.items() if found and kind in found.bases - {found.target}]

    def _signature(self, target: str) -> Signature | None:
        found = self._sources.locate(target)
        if found is None:
            return None
        where = {"module": found.module.name, "file": found.module.file, "qualname": found.qualname}
        return replace(self._read(target, found), **where)  # type: ignore[arg-type]

    def _read(self, target: str, found: Definition) -> Signature:
        if found.node is None:
            return Signature(target, is_class=False, parameters=(), any_name=True)
        if not isinstance(found.node, ast.ClassDef):
            parameters, rest = parameters_of_function(found.node, skip=_is_class_method(found.node))
            return Signature(target, False, tuple(parameters), any_name=rest is not None)
        lineage = self._lineage(found)
        parameters, any_name = constructor(lineage)
        return Signature(
            target,
            is_class=True,
            parameters=tuple(parameters),
            any_name=any_name,
            bases=frozenset(item.dotted for item in lineage if item),
            knows_bases=None not in lineage,
            logs=_texts(lineage, "logs"),
            offers=_declared(lineage, "offers", "add_evaluation_model"),
            tags=_declared(lineage, "tags", "request", "checkpoint_writer"),
            is_repeatable=_class_value(lineage, "is_repeatable") is not False,
            flaw=flaw(lineage),
        )

    def _lineage(self, definition: Definition, seen: frozenset[str] = frozenset()) -> list[Definition | None]:
        """Return a class and its ancestors in the order of look-up; None stands for one that cannot be read."""
        assert isinstance(definition.node, ast.ClassDef)
        found: list[Definition | None] = [definition]
        for node in definition.node.bases:
            name = dotted(node.value if isinstance(node, ast.Subscript) else node)
            if name and name[-1] in _ROOTS:
                continue
            base = self._base(definition, name)
            readable = base and isinstance(base.node, ast.ClassDef) and base.dotted not in seen
            found.extend(self._lineage(base, seen | {definition.dotted}) if base and readable else [None])
        last = {item.dotted if item else None: index for index, item in enumerate(found)}
        return [item for index, item in enumerate(found) if last[item.dotted if item else None] == index]

    def _base(self, definition: Definition, name: list[str] | None) -> Definition | None:
        try:
            return self._sources.attribute(definition.module, name) if name else None
        except MissingName:  # a builtin class, or something that only running the module would tell
            return None


def _is_class_method(function: Function) -> bool:
    return any(dotted(node) == ["classmethod"] for node in function.decorator_list)


def _class_value(lineage: list[Definition | None], name: str) -> Any:
    """Return the plain value of an attribute of a class; UNKNOWN if it is another one, or none can be read."""
    for definition in lineage:
        if definition is None or not isinstance(definition.node, ast.ClassDef):
            return UNKNOWN
        for item in definition.node.body:
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
            if any(dotted(target) == [name] for target in targets):
                return literal(getattr(item, "value", None))
    return UNKNOWN


def _declared(
    lineage: list[Definition | None], name: str, method: str, owner: str | None = None
) -> tuple[str, ...] | None:
    """Return what a class declares in an attribute; None if it says nothing and may call a method of the owner.

    It may if it calls one of this name, or hands the owner to something else.
    """
    for definition in filter(None, lineage):
        if _class_value([definition], name) is not UNKNOWN:
            break
        text = definition.module.source or ""  # mostly it names neither of the two, and need not be searched as a tree
        is_named = method in text or (owner is not None and owner in text)
        nodes = list(ast.walk(definition.node)) if definition.node and is_named else []
        if any(isinstance(node, ast.Attribute) and node.attr == method for node in nodes):
            return None
        if owner is not None and any(isinstance(node, ast.Call) and _hands_on(node, owner) for node in nodes):
            return None
    return _texts(lineage, name)


def _hands_on(call: ast.Call, name: str) -> bool:
    """Whether a call has an object of this name among its arguments, and is not that of a base's constructor."""
    given = [*call.args, *(word.value for word in call.keywords)]
    return getattr(call.func, "attr", "") != "__init__" and any((dotted(item) or [""])[-1] == name for item in given)


def _texts(lineage: list[Definition | None], name: str) -> tuple[str, ...] | None:
    value = _class_value(lineage, name)
    is_list = isinstance(value, list | tuple) and all(isinstance(key, str) for key in value)
    return tuple(value) if is_list else None
