"""Whether a plain value from YAML fits an annotation, judged by the annotation's source text."""

import ast
from collections.abc import Mapping
from functools import cache
from typing import Any

from ksuit_runner.config.types import NUMBER_RANGES

_PLAIN: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
    "Path": (str,),
    "PathLike": (str,),
    "Duration": (str,),
    "DatasetKey": (str,),
    "MetricKey": (str,),
}
_YAML = (type(None), bool, int, float, str, list, Mapping)
LISTS = frozenset({"Sequence", "list", "List", "Iterable", "Collection", "set", "Set", "frozenset"})
TUPLES = frozenset({"tuple", "Tuple"})
MAPPINGS = frozenset({"Mapping", "MutableMapping", "dict", "Dict"})
OBJECTS = frozenset({"Callable", "Tensor", "Parameter", "Module", "Optimizer", "LRScheduler", "Dataset"})


def fits(value: Any, annotation: str) -> bool:
    """Whether a plain value fits; True also where the annotation says too little.

    A mapping with ``_target_`` stands for an object and fits everything. A whole number fits ``float``; true and false
    fit ``bool`` alone.

    Args:
        value: None, bool, int, float, str, or lists and mappings of them.
        annotation: Source text such as ``Sequence[int] | None``.
    """
    tree = parse(annotation)
    return tree is None or _fits(value, tree) is not False


@cache
def mentions(annotation: str | None, name: str) -> bool:
    """Whether a name occurs in an annotation."""
    tree = parse(annotation) if annotation else None
    return tree is not None and any(last_name(node) == name for node in ast.walk(tree))


@cache
def parse(annotation: str) -> ast.expr | None:
    """Return an annotation as a tree; None if it is none."""
    try:
        return ast.parse(annotation.strip(), mode="eval").body
    except SyntaxError:
        return None


def last_name(node: ast.AST) -> str | None:
    """Return the last part of a name: ``Optional`` for ``typing.Optional``."""
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _fits(value: Any, node: ast.expr) -> bool | None:
    """Judge a value: None means that the annotation says too little."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted part
        tree = parse(node.value)
        return None if tree is None else _fits(value, tree)
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    if not isinstance(value, _YAML):
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _any(_fits(value, node.left), _fits(value, node.right))
    if isinstance(node, ast.Subscript):
        arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _fits_generic(value, last_name(node.value), arguments)
    return _fits_name(value, last_name(node))


def _fits_name(value: Any, name: str | None) -> bool | None:
    name = name or ""
    if name in ("Any", "object"):
        return True
    if allowed := NUMBER_RANGES.get(name):
        return allowed.fits(value)
    if name in _PLAIN:
        return isinstance(value, _PLAIN[name]) and (name == "bool" or not isinstance(value, bool))
    if name in LISTS or name in TUPLES:
        return isinstance(value, list)
    if name in MAPPINGS:
        return isinstance(value, Mapping)
    return False if name in OBJECTS else None


def _fits_generic(value: Any, name: str | None, arguments: list[ast.expr]) -> bool | None:
    if name == "Union":
        return _any(*(_fits(value, argument) for argument in arguments))
    if name == "Optional":
        return value is None or _fits(value, arguments[0])
    if name in ("Annotated", "Final"):
        return _fits(value, arguments[0])
    if name == "Literal":
        return _any(*(_is_literal(value, argument) for argument in arguments))
    if name in LISTS:
        return isinstance(value, list) and _all(_fits(item, arguments[0]) for item in value)
    if name in TUPLES:
        return isinstance(value, list) and _fits_tuple(value, arguments)
    if name in MAPPINGS and len(arguments) == 2:
        return isinstance(value, Mapping) and _all(
            _all((_fits(key, arguments[0]), _fits(item, arguments[1]))) for key, item in value.items()
        )
    return _fits_name(value, name)


def _fits_tuple(value: list[Any], arguments: list[ast.expr]) -> bool | None:
    last = arguments[-1] if arguments else None  # None for tuple[()]
    if isinstance(last, ast.Constant) and last.value is Ellipsis:
        return _all(_fits(item, arguments[0]) for item in value)
    return len(value) == len(arguments) and _all(map(_fits, value, arguments))


def _is_literal(value: Any, node: ast.expr) -> bool | None:
    try:
        literal = ast.literal_eval(node)
    except ValueError:
        return None
    return type(value) is type(literal) and bool(value == literal)


def _any(*verdicts: bool | None) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def _all(verdicts: Any) -> bool | None:
    seen = list(verdicts)
    return False if False in seen else None if None in seen else True
