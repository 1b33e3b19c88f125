"""The constructor of a class, read from its source: what it takes, and whether it calls that of its base class."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ksuit_runner.config.check.signature_lookup import Definition
from ksuit_runner.config.check.signature_source import Function, dotted, flatten
from ksuit_runner.config.schema import UNKNOWN, TargetParameter


def constructor(lineage: list[Definition | None]) -> tuple[list[TargetParameter], bool]:
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
    own, rest = parameters_of_function(method, skip=1)
    if rest is None:
        return own, False
    call = next((node for node in ast.walk(method) if _passes_on(node, rest)), None)
    if not isinstance(call, ast.Call):
        return own, True
    asked, any_name = constructor(ancestors)
    positional = _positional(call)
    taken = {parameter.name for parameter in own} | {word.arg for word in call.keywords if word.arg}
    taken |= {parameter.name for parameter in asked[:positional]}
    uses = sum(isinstance(node, ast.Name) and node.id == rest for node in ast.walk(method))
    return own + [item for item in asked if item.name not in taken], any_name or uses > 1


def flaw(lineage: list[Definition | None]) -> str:
    """Return how the first constructor of a lineage fails to pass on what the next one needs; empty if it does not."""
    own = next((item for item in lineage if item is None or _own_constructor(item)), None)
    method = _own_constructor(own) if own else None
    if own is None or method is None:
        return ""
    asked, _ = constructor(lineage[lineage.index(own) + 1 :])
    required = [parameter.name for parameter in asked if parameter.required]
    file = Path(own.module.file or own.module.name)
    where = f"{own.qualname}.__init__ ({'/'.join(file.parts[-2:])}, line {method.lineno})"
    if required and not any(_is_constructor(node) for node in ast.walk(method)):
        return f"{where} does not call super().__init__(**kwargs), by which its base class gets what it needs"
    for call in ast.walk(method):
        if not isinstance(call, ast.Call) or not _is_constructor(call.func):
            continue
        is_open = any(isinstance(item, ast.Starred) for item in call.args) or any(
            not word.arg for word in call.keywords
        )
        given = {parameter.name for parameter in asked[: _positional(call)]} | {word.arg for word in call.keywords}
        if not is_open and (lost := [name for name in required if name not in given]):
            return f"{where} does not pass {', '.join(lost)} on: take **kwargs, and call super().__init__(**kwargs)"
    return ""


def _own_constructor(definition: Definition) -> Function | None:
    return _method(definition.node, "__init__") if isinstance(definition.node, ast.ClassDef) else None


def _is_constructor(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "__init__"


def _passes_on(node: ast.AST, rest: str) -> bool:
    """Whether a node is the call of a base's constructor with ``**rest``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "__init__":
        return False
    return any(word.arg is None and dotted(word.value) == [rest] for word in node.keywords)


def _positional(call: ast.Call) -> int:
    """Return how many parameters the call of a base's constructor gives by position; ``*args`` is empty here."""
    given = sum(not isinstance(item, ast.Starred) for item in call.args)
    return max(given - (not _is_super(call)), 0)


def _is_super(call: ast.Call) -> bool:
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    return isinstance(owner, ast.Call) and dotted(owner.func) == ["super"]


def parameters_of_function(function: Function, skip: int = 0) -> tuple[list[TargetParameter], str | None]:
    """Return a function's parameters and the name of its ``**kwargs``, if it has them."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    found = [_parameter(item, default) for item, default in zip(positional, defaults, strict=True)][skip:]
    found += [_parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return found, arguments.kwarg.arg if arguments.kwarg else None


def _parameter(argument: ast.arg, default: ast.expr | None) -> TargetParameter:
    return TargetParameter(argument.arg, _text(argument.annotation), default is None, literal(default))


def _fields(lineage: list[Definition | None]) -> tuple[list[TargetParameter], bool]:
    """Return the fields of a dataclass, those of its ancestors first."""
    found: dict[str, TargetParameter] = {}
    for definition in reversed(lineage):
        for item in definition.node.body if definition and isinstance(definition.node, ast.ClassDef) else []:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            annotation = _text(item.annotation) or ""
            options = {word.arg: word.value for word in getattr(item.value, "keywords", [])}
            if "ClassVar" in annotation or "KW_ONLY" in annotation or literal(options.get("init")) is False:
                continue
            is_field = isinstance(item.value, ast.Call) and (dotted(item.value.func) or [""])[-1] == "field"
            required = item.value is None or (is_field and not {"default", "default_factory"} & options.keys())
            default = options.get("default") if is_field else item.value
            found[item.target.id] = TargetParameter(item.target.id, annotation, required, literal(default))
    return list(found.values()), None in lineage


def _method(node: ast.ClassDef, name: str) -> Function | None:
    found = [item for item in flatten(node.body) if isinstance(item, Function) and item.name == name]
    return found[-1] if found else None


def literal(node: ast.expr | None) -> Any:
    """Return the plain value that an expression writes; UNKNOWN for any other expression, and for none."""
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
