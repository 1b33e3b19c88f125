"""The units of a model: the modules whose parameters FSDP2 gathers together, and frees together."""

from collections.abc import Mapping, Sequence

from torch import nn

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.name_patterns import matching_modules


def unit_names(inner: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Return the names of the modules that are units, from the inner to the outer ones.

    Raises:
        ConfigError: A pattern matches none.
    """
    trees = {name: module for name, module in inner.named_modules() if name and any(True for _ in module.parameters())}
    if patterns is None:
        return _default_names(inner, trees)
    found = matching_modules(patterns, trees, "strategy.units", "module with parameters")
    return sorted(found, key=lambda name: -name.count("."))


def _default_names(inner: nn.Module, trees: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the children of the largest list of modules that share no parameters with others."""
    lists: list[tuple[str, nn.Module]] = []
    for kind in (nn.ModuleList, nn.Sequential):
        lists = lists or [(name, module) for name, module in inner.named_modules() if isinstance(module, kind)]
    largest = max(lists, key=lambda item: sum(each.numel() for each in item[1].parameters()), default=None)
    if largest is None:
        return []
    prefix, module = largest
    names = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_children()]
    shared = _shared(inner, names)
    return [name for name in names if name in trees and name not in shared.values()]


def _shared(inner: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return the parameters of units that are also elsewhere, by name, with the unit."""
    places: dict[int, set[str]] = {}
    for name, item in inner.named_parameters(remove_duplicate=False):
        unit = max((unit for unit in names if name.startswith(f"{unit}.")), key=len, default="")
        places.setdefault(id(item), set()).add(unit)
    return {
        name: unit
        for name, item in inner.named_parameters(remove_duplicate=False)
        for unit in places[id(item)]
        if unit and len(places[id(item)]) > 1
    }


def check_parameters(inner: nn.Module, names: Sequence[str]) -> None:
    """Check that FSDP2 can spread the parameters.

    Raises:
        ConfigError: It cannot.
    """
    for name, unit in _shared(inner, names).items():
        raise ConfigError(
            f"'{unit}' shares the parameter '{name}' with a module that is not in it: leave it out of the units",
            path="strategy.units",
        )
    for name, item in inner.named_parameters():
        if not item.is_contiguous():
            raise ConfigError(f"'{name}' is not row-major in memory, which strategy=fsdp needs", path="model")
    for unit, module in (*((name, inner.get_submodule(name)) for name in names), ("", inner)):
        inside = [other for other in names if other != unit and other.startswith(f"{unit}.".lstrip("."))]
        own = {
            item.dtype
            for name, item in module.named_parameters()
            if not any(f"{unit}.{name}".lstrip(".").startswith(f"{other}.") for other in inside)
        }
        if len(own) > 1:
            listed = ", ".join(sorted(map(str, own)))
            raise ConfigError(
                f"the unit '{unit or 'rest'}' has parameters of several dtypes ({listed}): give each a unit of its own",
                path="strategy.units",
            )
