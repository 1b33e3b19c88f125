"""Nested batches: mappings, lists, tuples and dataclasses in any nesting."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def entries(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a container by key, index or field name; none for a value that is not a container."""
    if isinstance(tree, (list, tuple)):
        return enumerate(tree)
    if isinstance(tree, Mapping):
        return tree.items()
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    return ()


def is_movable(value: Any) -> bool:
    """Whether a value has its own way to move to a device, such as PyG's Batch, or a packed sequence."""
    return callable(getattr(value, "to", None)) and not isinstance(value, type)


def is_opaque(value: Any) -> bool:
    """Whether a value is moved as a whole, and nothing is known about what is inside; not a mapping or a dataclass."""
    return is_movable(value) and not isinstance(value, Mapping) and not is_dataclass(value)


def rebuilt(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return a container of the same kind with its entries changed, or the container itself if none of them is.

    No constructor is called where a copy will do, so that other attributes of a container are kept.

    Args:
        tree: Any value; what is not a container has no entries.
        change: Maps an entry to its replacement.
    """
    changed = {key: new for key, value in entries(tree) if (new := change(value)) is not value}
    if not changed:
        return tree
    if type(tree) is dict:
        return {**tree, **changed}
    if isinstance(tree, tuple):
        items = [changed.get(index, value) for index, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, Mapping) and not isinstance(tree, MutableMapping):
        return type(tree)({**tree, **changed})  # type: ignore[call-arg]
    other: Any = copy(tree)
    for key, value in changed.items():
        if isinstance(tree, (MutableMapping, list)):
            other[key] = value
        else:  # a dataclass, which may be frozen
            object.__setattr__(other, key, value)
    return other


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in a tree."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for _, value in entries(tree):
            yield from tensors_in(value)


def named_tensors(tree: Any, start: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walk all tensors in a structure, each with the way to it, such as ``hidden/0``; ``start`` is where it is."""
    for key, value in entries(tree):
        way = f"{start}/{key}" if start else str(key)
        if isinstance(value, Tensor):
            yield way, value
        else:
            yield from named_tensors(value, way)
