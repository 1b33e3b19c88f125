"""The signature of a class or factory function, read from its source without importing it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import Any

from ksuit_runner.config.check.signature_lookup import Definition, MissingName, Sources
from ksuit_runner.config.check.signature_source import Function, dotted, flatten
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
    """

    target: str
    is_class: bool
    parameters: tuple[TargetParameter, ...]
    any_name: bool
    bases: frozenset[str] = frozenset()
    knows_bases: bool = True
    logs: tuple[str, ...] | None = None
    module: str = ""
    file: str | None = None
    qualname: str = ""


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
            parameters, rest = _parameters(found.node, skip=_is_class_method(found.node))
            return Signature(target, False, tuple(parameters), any_name=rest is not None)
        lineage = self._lineage(found)
        parameters, any_name = _constructor(lineage)
        return Signature(
            target,
            is_class=True,
            parameters=tuple(parameters),
            any_name=any_name,
            bases=frozenset(item.dotted for item in lineage if item),
            knows_bases=None not in lineage,
            logs=_logs(lineage),
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


def _constructor(lineage: list[Definition | None]) -> tuple[list[TargetParameter], bool]:
    """Return the parameters of the first constructor in a lineage, and whether there may be more."""
    for index, definition in enumerate(lineage):
        if definition is None:
            return [], True
        assert isinstance(definition.node, ast.ClassDef)
        method = _method(definition.node, "__init__") or _method(definition.node, "__new__")
        if method:
            return _with_base(method, lineage[index + 1 :])
        decorators = [dotted(getattr(node, "func", node)) or [""] for node in definition.node.decorator_list]
        if any(name[-1] == "dataclass" for name in decorators):
            return _fields(lineage[index:])
        if decorators:  # it may add a constructor
            return [], True
    return [], False


def _with_base(method: Function, ancestors: list[Definition | None]) -> tuple[list[TargetParameter], bool]:
    own, rest = _parameters(method, skip=1)
    if rest is None:
        return own, False
    call = next((node for node in ast.walk(method) if _passes_on(node, rest)), None)
    if not isinstance(call, ast.Call):
        return own, True
    asked, any_name = _constructor(ancestors)
    positional = len(call.args) - (not _is_super(call))
    taken = {parameter.name for parameter in own} | {word.arg for word in call.keywords if word.arg}
    taken |= {parameter.name for parameter in asked[: max(positional, 0)]}
    uses = sum(isinstance(node, ast.Name) and node.id == rest for node in ast.walk(method))
    return own + [item for item in asked if item.name not in taken], any_name or uses > 1


def _is_class_method(function: Function) -> bool:
    return any(dotted(node) == ["classmethod"] for node in function.decorator_list)


def _passes_on(node: ast.AST, rest: str) -> bool:
    """Whether a node is the call of a base's constructor with ``**rest``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "__init__":
        return False
    return any(word.arg is None and dotted(word.value) == [rest] for word in node.keywords)


def _is_super(call: ast.Call) -> bool:
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    return isinstance(owner, ast.Call) and dotted(owner.func) == ["super"]


def _parameters(function: Function, skip: int = 0) -> tuple[list[TargetParameter], str | None]:
    """Return a function's parameters and the name of its ``**kwargs``, if it has them."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    found = [_parameter(item, default) for item, default in zip(positional, defaults, strict=True)][skip:]
    found += [_parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return found, arguments.kwarg.arg if arguments.kwarg else None


def _parameter(argument: ast.arg, default: ast.expr | None) -> TargetParameter:
    return TargetParameter(argument.arg, _text(argument.annotation), default is None, _literal(default))


def _fields(lineage: list[Definition | None]) -> tuple[list[TargetParameter], bool]:
    """Return the fields of a dataclass, those of its ancestors first."""
    found: dict[str, TargetParameter] = {}
    for definition in reversed(lineage):
        for item in definition.node.body if definition and isinstance(definition.node, ast.ClassDef) else []:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            annotation = _text(item.annotation) or ""
            options = {word.arg: word.value for word in getattr(item.value, "keywords", [])}
            if "ClassVar" in annotation or "KW_ONLY" in annotation or _literal(options.get("init")) is False:
                continue
            is_field = isinstance(item.value, ast.Call) and (dotted(item.value.func) or [""])[-1] == "field"
            required = item.value is None or (is_field and not {"default", "default_factory"} & options.keys())
            default = options.get("default") if is_field else item.value
            found[item.target.id] = TargetParameter(item.target.id, annotation, required, _literal(default))
    return list(found.values()), None in lineage


def _method(node: ast.ClassDef, name: str) -> Function | None:
    found = [item for item in flatten(node.body) if isinstance(item, Function) and item.name == name]
    return found[-1] if found else None


def _logs(lineage: list[Definition | None]) -> tuple[str, ...] | None:
    for definition in lineage:
        if definition is None or not isinstance(definition.node, ast.ClassDef):
            return None
        for item in definition.node.body:
            targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
            if any(dotted(target) == ["logs"] for target in targets):
                value = _literal(getattr(item, "value", None))
                is_list = isinstance(value, list | tuple) and all(isinstance(key, str) for key in value)
                return tuple(value) if is_list else None
    return None


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return UNKNOWN
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return UNKNOWN


def _text(annotation: ast.expr | None) -> str | None:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    return ast.unparse(annotation) if annotation else None
