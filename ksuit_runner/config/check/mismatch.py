"""Says in words why a plain value from YAML does not fit an annotation."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ksuit_runner.config.check.annotation import LISTS, MAPPINGS, OBJECTS, TUPLES, fits, last_name, parse
from ksuit_runner.config.types import NUMBER_RANGES, NumberRange
from ksuit_runner.errors import short


def _words_of(allowed: NumberRange) -> tuple[str, str]:
    return f"a {allowed.noun} {allowed.words}", f"{allowed.noun}s {allowed.words}"


_WORDS: Mapping[str, tuple[str, str]] = {
    "int": ("a whole number", "whole numbers"),
    "float": ("a number", "numbers"),
    "str": ("a text", "texts"),
    "bool": ("true or false", "true or false"),
    "None": ("null", "nulls"),
    "Path": ("a path", "paths"),
    "PathLike": ("a path", "paths"),
    "Duration": ("a duration such as 90m or 1d 12h", "durations such as 90m or 1d 12h"),
    "DatasetKey": ("a key of data.datasets, such as test", "keys of data.datasets, such as test"),
    "MetricKey": (
        "the key of a logged metric, such as accuracy/validation",
        "keys of logged metrics, such as accuracy/validation",
    ),
    "Any": ("anything", "any values"),
    **dict.fromkeys(LISTS | TUPLES, ("a list", "lists")),
    **dict.fromkeys(MAPPINGS, ("a mapping", "mappings")),
    **{name: _words_of(allowed) for name, allowed in NUMBER_RANGES.items()},
    **{name: (f"an object with a _target_, a {name}", f"objects with a _target_, {name}s") for name in OBJECTS},
    "Callable": ("an object with a _target_ that can be called", "objects with a _target_ that can be called"),
}
"""Name of a type -> one of it, and several."""

_OF_OBJECTS = frozenset(word for name in OBJECTS for word in _WORDS[name])


def mismatch(value: Any, annotation: str) -> str | None:
    """Say why a value does not fit, as ``expects a whole number, or null, got 'abc'``; None if it fits.

    Args:
        value: None, bool, int, float, str, or lists and mappings of them.
        annotation: Source text such as ``Sequence[int] | None``.
    """
    tree = parse(annotation)
    if tree is None or fits(value, annotation):
        return None
    return f"expects {_either(_alternatives(tree))}, got {_in_yaml(value)}"


def _alternatives(node: ast.expr, is_plural: bool = False) -> list[str]:
    """Return what a value may be, one by one; what has no words as it is written in Python."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and (quoted := parse(node.value)):
        return _alternatives(quoted, is_plural)
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left, is_plural), *_alternatives(node.right, is_plural)]
    name, arguments = last_name(node) or "", []
    if isinstance(node, ast.Subscript):
        name = last_name(node.value) or ""
        arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return [_literal(argument) for argument in arguments]
    if name in ("Union", "Optional"):
        found = [text for argument in arguments for text in _alternatives(argument, is_plural)]
        return [*found, _WORDS["None"][is_plural]] if name == "Optional" else found
    if name in ("Annotated", "Final"):
        return _alternatives(arguments[0], is_plural)
    if name not in _WORDS:
        return [ast.unparse(node)]
    word = _WORDS[name][is_plural]
    if name in TUPLES and isinstance(node, ast.Subscript):
        return [f"{word} of {_items(arguments)}"]
    if name in LISTS and arguments:
        return [f"{word} of {_either(_alternatives(arguments[0], True))}"]
    if name in MAPPINGS and len(arguments) == 2:
        return [f"{word} from {' to '.join(_either(_alternatives(item, True)) for item in arguments)}"]
    return [word]


def _items(arguments: Sequence[ast.expr]) -> str:
    """Return the items of a tuple in words: those of one kind by their number, others one by one."""
    is_open = bool(arguments) and isinstance(arguments[-1], ast.Constant) and arguments[-1].value is Ellipsis
    kinds = [ast.unparse(argument) for argument in arguments]
    if is_open or len(set(kinds)) == 1:
        several = _either(_alternatives(arguments[0], True))
        return several if is_open else f"{len(arguments)} {several}"
    return " and ".join(_either(_alternatives(argument)) for argument in arguments) or "nothing"


def _either(alternatives: Sequence[str]) -> str:
    """Join alternatives, without the objects among them that a plain value was hardly meant to be."""
    plain = [word for word in alternatives if word not in _OF_OBJECTS]
    *others, last = dict.fromkeys(alternatives if {*plain} <= {*_WORDS["None"]} else plain)
    return f"{', '.join(others)}, or {last}" if others else last


def _literal(node: ast.expr) -> str:
    try:
        return _in_yaml(ast.literal_eval(node))
    except ValueError:
        return ast.unparse(node)


def _in_yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else short(value)
