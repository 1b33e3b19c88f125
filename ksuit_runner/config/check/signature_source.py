"""Modules by their source text: which names they bind, and by what."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from ksuit_runner.errors import ConfigError

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """A module by its source text, which is read and parsed on first use.

    Attributes:
        name: Its dotted name.
        folders: Where its submodules are, or None if it is not a package.
    """

    def __init__(self, name: str, loader: Any = None, folders: Sequence[str] | None = None) -> None:
        self.name = name
        self.folders = folders
        self._loader = loader

    @property
    def file(self) -> str | None:
        """Its file, if it has one."""
        path = getattr(self._loader, "path", None)
        return path if isinstance(path, str) else None

    @cached_property
    def source(self) -> str | None:
        """Its source text; empty for a namespace package, None for a compiled module."""
        if self._loader is None:
            return "" if self.folders is not None else None
        get_source = getattr(self._loader, "get_source", lambda name: None)
        try:
            text: str | None = get_source(self.name)
        except (ImportError, OSError, SyntaxError):
            return None
        return text

    @cached_property
    def statements(self) -> list[ast.stmt]:
        """Its statements, those of ``if``, ``try`` and ``with`` among them; what a later one binds counts."""
        try:
            return list(flatten(ast.parse(self.source or "").body))
        except SyntaxError as error:
            raise ConfigError(f"module '{self.name}', line {error.lineno}: {error.msg}") from None

    @cached_property
    def names(self) -> dict[str, ast.stmt]:
        """What each global name is bound by; a class or function that is replaced by ``X = decorate(X)`` is itself."""
        found: dict[str, ast.stmt] = {}
        for statement in self.statements:
            for name in _bound(statement):
                if name not in found or not _decorates(statement, name):
                    found[name] = statement
        return found

    @cached_property
    def stars(self) -> list[str]:
        """Modules whose names are all imported, the last one first."""
        found = [
            self.absolute(item)
            for item in self.statements
            if isinstance(item, ast.ImportFrom) and item.names[0].name == "*"
        ]
        return found[::-1]

    @cached_property
    def exported(self) -> frozenset[str] | None:
        """The names in its ``__all__``, or None if there is none, or it is more than one list of texts."""
        written = [item for item in self.statements if "__all__" in _changed(item)]
        if len(written) != 1 or not isinstance(written[0], ast.Assign | ast.AnnAssign):
            return None
        parts = getattr(written[0].value, "elts", [None])
        names = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        return frozenset(names) if len(names) == len(parts) else None

    @property
    def is_open(self) -> bool:
        """Whether it may have names that are not in its source."""
        source = self.source
        if source is None:
            return True
        makes_up_names = "__getattr__" in self.names or "globals()" in source or "sys.modules[" in source
        return makes_up_names and self.exported is None

    def may_have(self, name: str) -> bool:
        """Whether its text leaves it open that it has a name; otherwise it need not be parsed."""
        source = self.source
        marks = (name, "import *", "__getattr__", "globals()", "sys.modules[")
        return source is None or any(mark in source for mark in marks)

    def absolute(self, statement: ast.ImportFrom) -> str:
        """Return the dotted name of the module that a ``from`` statement imports from."""
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        above = parts[: len(parts) - statement.level + (self.folders is not None)]
        return ".".join([*above, statement.module] if statement.module else above)


def dotted(node: ast.AST | None) -> list[str] | None:
    """Return the parts of a dotted name, or None for any other expression."""
    if isinstance(node, ast.Name):
        return [node.id]
    above = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return [*above, node.attr] if above and isinstance(node, ast.Attribute) else None


def flatten(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, the likelier branch of two last."""
    for statement in body:
        if isinstance(statement, ast.If | ast.For | ast.While):
            yield from flatten([*statement.orelse, *statement.body])
        elif isinstance(statement, ast.Try):
            handled = [item for handler in statement.handlers for item in handler.body]
            yield from flatten([*handled, *statement.body, *statement.orelse, *statement.finalbody])
        elif isinstance(statement, ast.With):
            yield from flatten(statement.body)
        else:
            yield statement


def _decorates(statement: ast.stmt, name: str) -> bool:
    """Whether a statement binds a name to what a function has made of it."""
    value = statement.value if isinstance(statement, ast.Assign) else None
    return isinstance(value, ast.Call) and any(dotted(item) == [name] for item in value.args)


def _changed(statement: ast.stmt) -> Iterator[str]:
    """Yield the global names that a statement binds, or changes in place: ``x += ...``, ``x.extend(...)``."""
    yield from _bound(statement)
    if isinstance(statement, ast.AugAssign):
        yield from dotted(statement.target) or ()
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        yield from (dotted(statement.value.func) or ())[:1]


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.ClassDef | Function):
        yield statement.name
    elif isinstance(statement, ast.ImportFrom):
        yield from (item.asname or item.name for item in statement.names if item.name != "*")
    elif isinstance(statement, ast.Import):
        yield from (item.asname or item.name.split(".")[0] for item in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        parts = [part for target in targets for part in getattr(target, "elts", [target])]
        yield from (part.id for part in parts if isinstance(part, ast.Name))
