"""The one place where configured objects are built: arguments from the config, collaborators from the runner."""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.places import INJECTED, PLACES, Parameter, Place, bind, check_injected, place_at
from ksuit_runner.targets import check_function, check_module, check_name, targets_in
from ksuit_runner.tracker.base import BaseTracker

Built = TypeVar("Built")


class OnDemand(NamedTuple):
    """A collaborator that is worked out only for an object that asks for it."""

    get: Callable[[], Any]


class Factory:
    """Builds the objects that a config describes.

    A constructor's parameter that carries the name of a collaborator gets that collaborator, all others come from the
    config; ``**kwargs`` passed on to a base class asks for what the base asks for.

    Args:
        config: The resolved config of the run.
    """

    def __init__(self, config: DictConfig) -> None:
        self._config = config

    def has(self, place: str) -> bool:
        """Whether the config describes an object at this place."""
        return OmegaConf.select(self._config, place) is not None

    def build(self, place: str, kind: type[Built], **collaborators: Any) -> Built:
        """Build the object at a place of the config.

        Args:
            place: Dotted place of its node.
            kind: Class that it has to be of.
            **collaborators: What the runner can provide, by name.

        Raises:
            ConfigError: The node does not fit the constructor, or builds something else.
        """
        target = self._target(place, kind)
        wanted = self._bind(place, target)
        try:
            given = {name: collaborators[name] for name in wanted if name in collaborators}
            built = target(**{name: _value(collaborator) for name, collaborator in given.items()})
        except KsuitError as error:
            raise _at(place, error) from error
        if not isinstance(built, kind):
            raise ConfigError(f"{place}._target_: it builds a {type(built).__name__}, which is no {kind.__name__}")
        return built

    def build_tracker(self, output_paths: OutputPaths) -> BaseTracker:
        """Build the tracker, which is not bound to a run yet."""
        return self.build("tracker", BaseTracker, output_paths=output_paths)  # type: ignore[type-abstract]

    def build_all(self, place: str, kind: type[Built], **collaborators: Any) -> dict[str, Built]:
        """Build every object below a place, by its key, which is handed to it as ``name``."""
        keys = list(OmegaConf.select(self._config, place) or {})
        return {key: self.build(f"{place}.{key}", kind, name=key, **collaborators) for key in keys}

    def delayed(self, place: str, kind: type | None) -> Callable[..., Any]:
        """Return what builds the object at a place once its collaborators are there, such as an optimizer."""
        target = self._target(place, kind)
        self._bind(place, target)
        return target

    def _target(self, place: str, kind: type | None) -> "partial[Any]":
        """Return the constructor with its arguments from the config, nested objects built.

        Everything that would be called is checked first, however deep it is nested; Hydra's own policy decides then.
        """
        node = OmegaConf.select(self._config, place)
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ConfigError(f"{place}: a `_target_` is needed")
        # From here on nothing refers to other places, so that what Hydra builds is what is checked here.
        plain = OmegaConf.to_container(node, resolve=True)
        assert isinstance(plain, dict)
        for below, name in targets_in(place, plain):
            made = _locate(below, name)
            _check(below, name, made, kind if below == place else None)
        try:
            # Hydra copies what it is given as call arguments; collaborators keep their identity by coming in later.
            target: partial[Any] = instantiate({"_convert_": "all", **plain, "_partial_": True})
        except HydraException as error:
            raise ConfigError(f"{place}: {_reason(error)}") from error
        return target

    @staticmethod
    def _bind(place: str, target: "partial[Any]") -> list[str]:
        parameters = parameters_of(target.func)
        names = [parameter.name for parameter in parameters]
        given = [*names[: len(target.args)], *target.keywords]
        any_name = any(item.kind is item.VAR_KEYWORD for item in _last_signature(target.func))
        injected = INJECTED[(place_at(place) or Place(None)).injects]
        wanted = bind(place, parameters, given, injected, any_name)
        check_injected(place, target.func.__qualname__, isinstance(target.func, type), wanted, injected)
        return wanted


def parameters_of(target: Callable[..., Any]) -> list[Parameter]:
    """Return all that a class or function can be given, also through ``**kwargs`` by its base classes."""
    found: dict[str, Parameter] = {}
    for signature in _signatures(target):
        for item in signature:
            if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY):
                found.setdefault(item.name, Parameter(item.name, required=item.default is item.empty))
    return list(found.values())


def _signatures(target: Callable[..., Any]) -> list[list[inspect.Parameter]]:
    """Return the signatures that an argument passes through, until one takes no ``**kwargs``."""
    if not isinstance(target, type):
        return [list(inspect.signature(target).parameters.values())]
    found = []
    for base in target.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        found.append(parameters)
        if not any(item.kind is item.VAR_KEYWORD for item in parameters):
            break
    return found


def _last_signature(target: Callable[..., Any]) -> list[inspect.Parameter]:
    signatures = _signatures(target)
    return signatures[-1] if signatures else []


def _locate(place: str, name: Any) -> Any:
    """Import what a target names and return it; nothing is called."""
    try:
        return instantiate({"_target_": check_name(name), "_partial_": True}).func
    except ConfigError as error:
        raise ConfigError(f"{place}._target_: {error}") from None
    except HydraException as error:
        raise ConfigError(f"{place}: {_reason(error)}") from error


def _check(place: str, name: str, made: Any, kind: type | None) -> None:
    module = str(getattr(made, "__module__", ""))
    try:
        check_module(name, module)
        if not isinstance(made, type):
            is_allowed = (place_at(place) or Place(None)).functions and isinstance(made, FunctionType)
            check_function(name, is_allowed, module, getattr(sys.modules.get(module), "__file__", None))
        elif kind is not None and not issubclass(made, kind):
            raise ConfigError(f"{made.__qualname__} is no {kind.__name__}")
    except ConfigError as error:
        raise ConfigError(f"{place}._target_: {error}") from None


def _value(collaborator: Any) -> Any:
    return collaborator.get() if isinstance(collaborator, OnDemand) else collaborator


def _at(place: str, error: KsuitError) -> KsuitError:
    """Name the place in an error that a constructor raised without knowing where it was configured."""
    text = str(error)
    known: Mapping[str, Place] = PLACES
    named = any(text.startswith(key.removesuffix(".*")) for key in known)
    return error if named else type(error)(f"{place}: {text}")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
