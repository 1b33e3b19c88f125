"""Finds the definition behind a dotted name in source files, without importing anything."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES, BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from shlex import quote
from typing import Any

from ksuit_runner.config.check.signature_source import Function, Module, dotted, flatten
from ksuit_runner.config.groups import folders_around
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.system.optional_package import EXTRAS, not_installed
from ksuit_runner.system.shipped_folders import NAME, CallbacksFinder

_MOST_SEARCHED = 500  # modules that are imported with a star: packages that are loaded lazily have thousands
_VALUES = (ast.Dict, ast.List, ast.Set, ast.Tuple, ast.ListComp, ast.DictComp, ast.JoinedStr)
_Steps = frozenset[tuple[str, ...]]


class MissingName(ConfigError):
    """There is no such module, or no such name in it."""


class Definition:
    """A class or function, and where it is defined.

    Attributes:
        module: The module.
        qualname: Name inside the module, with dots for what is nested in classes.
        node: Its source; None for a function of a compiled module.
    """

    def __init__(self, module: Module, qualname: str, node: ast.ClassDef | Function | None) -> None:
        self.module = module
        self.qualname = qualname
        self.node = node

    @property
    def dotted(self) -> str:
        """Full dotted name."""
        return f"{self.module.name}.{self.qualname}"


class Sources:
    """Modules by name, each found once. Parent packages are walked by hand, as importing them is what it avoids."""

    def __init__(self) -> None:
        self._modules: dict[str, Module | None] = {}
        self._searched = 0  # modules for the target that is located

    def module(self, name: str) -> Module | None:
        """Return a module, or None if there is none of that name."""
        if name not in self._modules:
            parent = name.rpartition(".")[0]
            above = self.module(parent) if parent else None
            folders = (above.folders if above else None) if parent else sys.path
            self._modules[name] = _find(name, folders or ())
        return self._modules[name]

    def locate(self, target: str) -> Definition | None:
        """Return the definition behind a dotted name, or None if the source does not tell.

        Raises:
            MissingName: It does not exist; names the nearest that do.
        """
        self._searched = 0
        first, *rest = target.split(".")
        module = self.module(first)
        if module is None:
            if first in EXTRAS:
                raise MissingName(not_installed(first))
            near = did_you_mean(first, _modules_in(sys.path) - sys.stdlib_module_names, longest=12)
            raise MissingName(f"there is no module '{first}'. {_elsewhere(first) or near}".rstrip())
        if not rest:
            raise MissingName(f"'{target}' is a module, not a class")
        return self.attribute(module, rest)

    def attribute(self, module: Module, names: Sequence[str], seen: _Steps = frozenset()) -> Definition | None:
        """Return the definition behind ``module.names[0].names[1]...``, following imports and aliases.

        Raises:
            MissingName: It does not exist; names the nearest that do.
        """
        head, *rest = names
        step = (module.name, *names)
        if step in seen:  # imports in a circle
            return None
        seen = seen | {step}
        if rest and (below := self.module(f"{module.name}.{head}")):
            return self.attribute(below, rest, seen)
        if head in module.names:
            return self._follow(module, module.names[head], head, rest, seen)
        is_open = module.is_open
        if is_open and module.folders and module.stars:
            below = self._exported(module, head)
            if below is not None or not rest:
                return self.attribute(below, names, seen) if below else self._unbound(module, head, rest, is_open)
        for star in map(self.module, module.stars):
            self._searched += 1
            if self._searched > _MOST_SEARCHED:
                return None
            if star is not None and not star.may_have(head):
                continue
            with suppress(MissingName):
                if found := self.attribute(star, names, seen) if star else None:
                    return found
                is_open = True
        return self._unbound(module, head, rest, is_open)

    def _exported(self, package: Module, name: str) -> Module | None:
        """Return the module below a package that is loaded lazily that defines a name; None if it is not only one.

        Such packages have thousands of modules: their texts are searched, which takes a tenth of parsing them.

        Raises:
            MissingName: None of them binds the name, as far as the text of a line tells, or lists it as a text.
        """
        definition = re.compile(rf"^(?:class|def) {name}\b|^{name}\s*[:=]".encode(), re.MULTILINE)
        written = (
            rf"""["']{name}["']""",  # listed
            rf"^\s*(?:class|def|async def) {name}\b|^[^#(\n]*\b{name}\b[^#(\n]*=",  # defined, at any depth
            rf"\b(?:import|as)\b[^#\n]*\b{name}\b",  # imported
            rf"^\s*{name}\s*,?\s*(?:#.*)?$",  # the same, in a line of its own
        )
        bound = re.compile("|".join(written).encode(), re.MULTILINE)
        folders = package.folders or ()
        files = [path for folder in folders for path in sorted(Path(folder).rglob("*.py")) if os.access(path, os.R_OK)]
        texts = {path: text for path in files if name.encode() in (text := path.read_bytes())}
        defining = [path for path, text in texts.items() if definition.search(text)]
        is_module = any(name in (path.stem, path.parent.name) for path in files)
        if not defining and not is_module and not any(map(bound.search, texts.values())):
            if not self._is_source_only(package):
                return None
            similar = _similar(name, files)
            hint = f" {did_you_mean(name, similar, longest=12)}" if similar else ""
            raise MissingName(f"there is no '{name}' in '{package.name}'.{hint}".rstrip())
        found = []
        for path in defining:
            folder = next(folder for folder in folders if path.is_relative_to(folder))
            below = path.relative_to(folder).with_suffix("").parts
            module = self.module(".".join((package.name, *below)))
            above = self.module(".".join((package.name, *below[:-1])))
            if module is not None and above is not None and (module.name in above.stars or name in above.names):
                found.append(module)
        return found[0] if len(found) == 1 else None

    def _is_source_only(self, package: Module) -> bool:
        """Whether all names of a package are written in its own source files, and none in compiled or other modules."""
        folders = [Path(folder) for folder in package.folders or ()]
        is_compiled = any(next(folder.rglob(f"*{ending}"), None) for folder in folders for ending in EXTENSION_SUFFIXES)
        return not is_compiled and all(star.startswith(f"{package.name}.") for star in package.stars)

    def _follow(
        self, module: Module, statement: ast.stmt, head: str, rest: list[str], seen: _Steps
    ) -> Definition | None:
        if isinstance(statement, ast.ImportFrom):
            origin = next(item.name for item in statement.names if (item.asname or item.name) == head)
            source = self.module(module.absolute(statement))
            return self.attribute(source, [origin, *rest], seen) if source else None
        if isinstance(statement, ast.Import):
            item = next(item for item in statement.names if (item.asname or item.name.split(".")[0]) == head)
            source = self.module(item.name if item.asname else head)
            return self.attribute(source, rest, seen) if source and rest else None
        if isinstance(statement, ast.ClassDef | Function):
            return _member(Definition(module, head, statement), rest)
        if not rest and isinstance(getattr(statement, "value", None), _VALUES):
            raise MissingName(f"'{module.name}.{head}' is a value, not a class")
        alias = dotted(statement.value) if isinstance(statement, ast.Assign) and statement.value else None
        return self.attribute(module, [*alias, *rest], seen) if alias and alias[0] != head else None

    def _unbound(self, module: Module, head: str, rest: list[str], is_open: bool) -> Definition | None:
        if module.source is None:
            return _loaded(module, [head, *rest])
        if not rest and self.module(f"{module.name}.{head}"):
            raise MissingName(f"'{module.name}.{head}' is a module, not a class")
        if is_open and not (rest and module.folders):  # packages make up names, but hardly ever modules
            return None
        if head in (module.exported or ()):  # made when it is asked for
            return None
        is_ending = head == "py" and rest  # as of a file
        meant = f"Did you mean '{'.'.join([module.name, *rest])}'?" if is_ending else None
        hint = meant or did_you_mean(head, self._public(module), longest=12)
        raise MissingName(f"there is no '{head}' in '{module.name}'. {hint}".rstrip())

    def _public(self, module: Module) -> set[str]:
        """Return the public names of a module and its submodules."""
        found = _modules_in(module.folders or ())
        for name in module.stars:
            star = self.module(name)
            found |= self._public(star) if star and star is not module else set()
        return {name for name in found.union(module.names, module.exported or ()) if not name.startswith("_")}


def _similar(name: str, files: Iterable[Path]) -> set[str]:
    """Return the names of public classes in some files that begin like a name."""
    definition = re.compile(rf"^class ({re.escape(name[:3])}\w*)".encode(), re.MULTILINE)
    return {found.decode() for path in files for found in definition.findall(path.read_bytes())}


def _member(definition: Definition, names: list[str]) -> Definition | None:
    """Go down into a class; None for what it inherits or computes."""
    for name in names:
        body = definition.node.body if isinstance(definition.node, ast.ClassDef) else []
        found = [item for item in flatten(body) if isinstance(item, ast.ClassDef | Function) and item.name == name]
        if not found:
            return None
        definition = Definition(definition.module, f"{definition.qualname}.{name}", found[-1])
    return definition


def _elsewhere(module: str) -> str:
    """Say which folder around this one, where the command may have been meant to run, has a module; or nothing."""
    for folder in folders_around():
        if any(os.path.isfile(folder / file) for file in (f"{module}.py", f"{module}/__init__.py")):
            return f"{folder} has it: cd {quote(str(folder))}"
    return ""


def _modules_in(folders: Iterable[str]) -> set[str]:
    """Return the names of modules and packages in some folders; namespace packages are any folders."""
    paths = [Path(folder or os.getcwd()) for folder in folders]
    below = {
        item.name
        for path in paths
        if os.access(path, os.R_OK) and path.is_dir()
        for item in path.iterdir()
        if item.is_dir()
    }
    names = below | {item.name for item in pkgutil.iter_modules(map(str, paths))}
    return {name for name in names if name.isidentifier()}


def _find(name: str, folders: Iterable[str]) -> Module | None:
    if name == NAME:
        spec = CallbacksFinder.find_spec(name)
        return Module(name, spec.loader, spec.submodule_search_locations) if spec else None
    portions: list[str] = []  # of a namespace package
    for folder in folders:
        finder: Any = pkgutil.get_importer(folder or os.getcwd())
        spec = finder.find_spec(name) if finder else None
        if spec is not None and spec.loader is not None:
            return Module(name, spec.loader, spec.submodule_search_locations)
        portions.extend((spec.submodule_search_locations or ()) if spec else ())
    if portions:
        return Module(name, folders=portions)
    if name in sys.builtin_module_names:
        return Module(name)
    for finder in () if "." in name else sys.meta_path:  # such as that of a package installed in editable form
        if finder not in (BuiltinImporter, FrozenImporter, PathFinder) and (spec := finder.find_spec(name, None)):
            return Module(name, spec.loader, spec.submodule_search_locations)
    return None


def _loaded(module: Module, names: list[str]) -> Definition | None:
    """Look a name up in a compiled module that the process has loaded anyway, to distinguish functions from classes."""
    item: Any = sys.modules.get(module.name)
    if item is None:
        return None
    for name in names:
        if not hasattr(item, name):
            hint = did_you_mean(name, dir(item), longest=12)
            raise MissingName(f"there is no '{name}' in '{module.name}'. {hint}".rstrip())
        item = getattr(item, name)
    return None if isinstance(item, type) else Definition(module, ".".join(names), None)
