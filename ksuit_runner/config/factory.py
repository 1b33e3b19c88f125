"""Builds the objects that a config describes: arguments from the config, collaborators from the runner."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.construct import constructing, what_was_raised
from ksuit_runner.config.schema import (
    DATASETS,
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
from ksuit_runner.config.targets import Trust, check_function, check_module, check_name, targets_in
from ksuit_runner.errors import ConfigError, named_type, with_article
from ksuit_runner.system.imports import quick_imports

Built = TypeVar("Built")
_imported: dict[str, Any] = {}  # by target


class OnDemand(NamedTuple):
    """A collaborator that is created only for an object that asks for it."""

    get: Callable[[], Any]


class Factory:
    """Builds the objects that a config describes.

    A constructor's parameter that carries the name of a collaborator gets that collaborator, all others come from the
    config; ``**kwargs`` passed on to a base class asks for what the base asks for. Hydra's keys mean what they mean in
    Hydra: ``_target_``, ``_args_``, ``_partial_``, ``_recursive_``. Objects nested in the arguments are built as well,
    and all containers are plain ones, whatever ``_convert_`` says.

    Args:
        config: The config of the run; one of OmegaConf is resolved first.
        trust: Limits of a config that was not composed here; None for one that was, or is known to be the user's own.
    """

    def __init__(self, config: DictConfig | Mapping[str, Any], trust: Trust | None = None) -> None:
        self.trust = trust
        # From here on nothing refers to another config path, so that what is built is what was checked.
        self._config: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config

    def has(self, path: str) -> bool:
        """Whether the config describes an object at this config path."""
        return self.node(path) is not None

    def build(self, path: str, kind: type[Built], **collaborators: Any) -> Built:
        """Build the object at a config path.

        Args:
            path: Config path of its node.
            kind: Class that it has to be of.
            **collaborators: What the runner can provide, by name.

        Raises:
            ConfigError: The node does not fit the constructor, or builds something else.
        """
        target = self._target(path, kind)
        wanted = self._bind(path, target)
        given = {name: collaborators[name] for name in wanted if name in collaborators}
        with constructing(path):
            built = target(**{name: _value(collaborator) for name, collaborator in given.items()})
        if not isinstance(built, kind):
            raise ConfigError(
                f"it builds {named_type(built)} instead of {with_article(kind.__name__)}", path=f"{path}._target_"
            )
        return built

    def build_or_default(self, path: str, kind: type[Built], **collaborators: Any) -> Built:
        """Build the object at a config path, as ``build``; where there is none, an object of the kind itself."""
        return self.build(path, kind, **collaborators) if self.has(path) else kind(**collaborators)

    def build_all(
        self,
        path: str,
        kind: type[Built],
        scope: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        **collaborators: Any,
    ) -> dict[str, Built]:
        """Build every object below a config path, by its key, which is handed to it as ``name``.

        Args:
            path: Config path of the node.
            kind: Class that they have to be of.
            scope: Makes the context in which the object of a key is built.
            **collaborators: What the runner can provide, by name.

        Raises:
            ConfigError: Some of them cannot be built; it names all of these.
        """
        built, refused = {}, list[ConfigError]()
        for key in self.node(path) or {}:
            try:
                with scope(key):
                    built[key] = self.build(f"{path}.{key}", kind, name=key, **collaborators)
            except ConfigError as error:
                refused.append(error)
        if refused:
            refused[0].add(refused[1:])
            raise refused[0]
        return built

    def import_all(self, path: str, kind: type) -> None:
        """Import the classes of all objects below a config path, and check them as before they are built.

        Args:
            path: Config path of the node.
            kind: Class that they have to be of.

        Raises:
            ConfigError: A file cannot be imported, or a class cannot be used.
        """
        for key in self.node(path) or {}:
            self._check_targets(f"{path}.{key}", self.node(f"{path}.{key}"), kind)

    def _check_targets(self, path: str, node: Any, kind: type | None) -> None:
        for below, name in targets_in(path, node):
            made = _locate(below, name, self.trust)
            _check(below, name, made, kind if below == path else None, self.trust)

    def objects_beside(self, path: str) -> list[str]:
        """Return the config paths of the objects that stand beside the arguments of the one at a config path."""
        return [f"{path}.{name}" for name in objects_beside(path, self.node(path))]

    def settings(self, path: str) -> dict[str, Any]:
        """Return what is in the node of an object for the runner, and is no argument of the object."""
        return settings_in(path, self.node(path))

    def delayed(self, path: str, kind: type | None) -> Callable[..., Any]:
        """Return what builds the object at a config path once its collaborators are there, such as an optimizer."""
        target = self._target(path, kind)
        self._bind(path, target)
        return target

    def node(self, path: str) -> Any:
        """Return the part of the config at a config path as plain values; None if there is none."""
        node = self._config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def _target(self, path: str, kind: type | None) -> "partial[Any]":
        """Return the constructor with its arguments from the config, nested objects built.

        Everything that would be called is checked first, however deep it is nested.
        """
        node = self.node(path)
        if not isinstance(node, dict) or "_target_" not in node:
            raise ConfigError("an object with a _target_ is needed", path=path)
        others = {*objects_beside(path, node), *settings_in(path, node)}
        node = {key: value for key, value in node.items() if key not in others}
        self._check_targets(path, node, kind)
        target = _build(path, {**node, "_partial_": True})
        assert isinstance(target, partial)
        return target

    @staticmethod
    def _bind(path: str, target: "partial[Any]") -> list[str]:
        # What a base class needs, its subclass may give it.
        signatures = _signatures(target.func)
        own = {parameter.name for parameter in next(iter(signatures), ())}
        parameters = [
            replace(parameter, required=parameter.required and parameter.name in own)
            for parameter in _parameters_in(signatures)
        ]
        names = [parameter.name for parameter in parameters]
        given = [*names[: len(target.args)], *target.keywords]
        any_name = any(item.kind is item.VAR_KEYWORD for item in next(reversed(signatures), ()))
        spec = spec_at(path) or ObjectSpec(None)
        wanted = bind(path, parameters, given, INJECTED[spec.injects], any_name)
        check_injected(path, target.func.__qualname__, isinstance(target.func, type), wanted, spec)
        return wanted


def parameters_of(target: Callable[..., Any]) -> list[TargetParameter]:
    """Return all that a class or function can be given, also through ``**kwargs`` by its base classes."""
    return _parameters_in(_signatures(target))


def _parameters_in(signatures: Sequence[Sequence[inspect.Parameter]]) -> list[TargetParameter]:
    found: dict[str, TargetParameter] = {}
    for signature in signatures:
        for item in signature:
            if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY):
                found.setdefault(item.name, TargetParameter(item.name, required=item.default is item.empty))
    return list(found.values())


def _signatures(target: Callable[..., Any]) -> list[list[inspect.Parameter]]:
    """Return the signatures that an argument passes through, until one takes no ``**kwargs``."""
    if not isinstance(target, type):
        return [list(inspect.signature(target).parameters.values())]
    found = []
    for base in target.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = _parameters_of(vars(base)["__init__"])
        found.append(parameters)
        if not any(item.kind is item.VAR_KEYWORD for item in parameters):
            break
    return found


@lru_cache(maxsize=1024)
def _parameters_of(initializer: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of an ``__init__`` without ``self``; the jobs of a sweep ask for the same ones."""
    return list(inspect.signature(initializer).parameters.values())[1:]


def _build(path: str, value: Any) -> Any:
    """Build what a part of a config describes; the targets in it were checked."""
    if isinstance(value, list):
        return [_build(f"{path}[{index}]", item) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    given = {key: item for key, item in value.items() if "_target_" not in value or key not in SPECIAL_KEYS}
    positional = value.get("_args_") or []
    if value.get("_recursive_", True):
        given = {key: _build(f"{path}.{key}", item) for key, item in given.items()}
        positional = _build(f"{path}._args_", positional)
    if "_target_" not in value:
        return given
    made = _locate(path, value["_target_"])
    if (spec_at(path) or ObjectSpec(None)).delayed:
        return _delayed(path, partial(made, *positional, **given))
    with constructing(path):
        return partial(made, *positional, **given) if value.get("_partial_") else made(*positional, **given)


def _delayed(path: str, target: "partial[Any]") -> Callable[..., Any]:
    """Return what builds an object from those of its collaborators that it asks for."""
    wanted = Factory._bind(path, target)

    def build(**collaborators: Any) -> Any:
        with constructing(path):
            return target(**{name: collaborators[name] for name in wanted})

    return build


def _locate(path: str, name: Any, trust: Trust | None = None) -> Any:
    """Import what a target names and return it; nothing is called."""
    try:
        checked = check_name(name)
        if trust is not None:
            trust.check_name(path, checked)
        return _import(checked)
    except ConfigError as error:
        error.locate(f"{path}._target_")
        raise
    except (HydraException, SystemExit) as error:
        cause = _cause(error)
        if isinstance(cause, ModuleNotFoundError) and cause.name == name:  # what is before its last part is there
            package, _, last = name.rpartition(".")
            raise ConfigError(f"there is no '{last}' in '{package}'", path=f"{path}._target_") from error
        raise ConfigError(f"'{name}' cannot be imported: {what_was_raised(cause)}", path=path) from error


def _import(name: str) -> Any:
    """Have Hydra find a target, under its own policy; again only if its module has another one, as after a reload."""
    module, _, last = name.rpartition(".")
    if name not in _imported or _imported[name] is not getattr(sys.modules.get(module), last, None):
        with quick_imports():
            _imported[name] = instantiate({"_target_": name, "_partial_": True}).func
    return _imported[name]


def _check(path: str, name: str, made: Any, kind: type | None, trust: Trust | None) -> None:
    module = str(getattr(made, "__module__", ""))
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        check_module(name, module)
        if not isinstance(made, type):
            inside = str(getattr(made, "__qualname__", ""))
            check_function(name, takes_functions(path) and _is_function(made), module, file, inside)
        if trust is not None:
            trust.check_definition(path, name, module, file)
            if not isinstance(made, type):
                trust.check_function(path, name, module, _asks(path, made))
            if module.startswith("ksuit_runner.") and spec_at(path) is None and not _may_be_nested(made):
                raise ConfigError(f"'{name}' is not a class that a config builds")
        if kind is not None and isinstance(made, type) and not issubclass(made, kind):
            raise ConfigError(f"{made.__qualname__} does not derive from {kind.__name__}")
        if spec_at(path) is DATASETS and isinstance(made, type) and not _is_dataset(made):
            raise ConfigError(
                f"{made.__qualname__} is not a dataset: it has neither __len__ and __getitem__ nor __iter__"
            )
    except ConfigError as error:
        error.locate(f"{path}._target_")
        raise


def _is_function(made: Any) -> bool:
    """Whether something is a function or a class method, and not a class or an object that can be called."""
    return isinstance(made, FunctionType) or (isinstance(made, MethodType) and isinstance(made.__self__, type))


def _asks(path: str, made: Callable[..., Any]) -> bool:
    injected = INJECTED[(spec_at(path) or ObjectSpec(None)).injects]
    return any(parameter.name in injected for parameter in parameters_of(made))


def _is_dataset(made: type) -> bool:
    has_items = hasattr(made, "__len__") and (hasattr(made, "__getitem__") or hasattr(made, "__getitems__"))
    return has_items or hasattr(made, "__iter__") or hasattr(made, "iterate")


def _may_be_nested(made: Any) -> bool:
    """Whether a shipped class is one that configs nest; others open files and the like."""
    ancestors = {f"{base.__module__}.{base.__qualname__}" for base in getattr(made, "__mro__", ())}
    kinds = {spec.kind for spec in OBJECT_SPECS.values()}
    return not ancestors.isdisjoint(kinds) or (isinstance(made, type) and _is_dataset(made))


def _value(collaborator: Any) -> Any:
    return collaborator.get() if isinstance(collaborator, OnDemand) else collaborator


def _cause(error: BaseException) -> BaseException:
    """Return what was raised at first: Hydra wraps what an import raises, and says less."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
