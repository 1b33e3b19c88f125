"""``initialize`` of the config: where the weights of a new run come from, and how their names are matched."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ksuit_runner.config.check.mismatch import mismatch
from ksuit_runner.errors import ConfigError, did_you_mean, short
from ksuit_runner.tensors.name_patterns import matches_any

NODE = "initialize"
FILE_TYPES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Ends of a ``from`` that is a file, and not a reference to a run; all but the first are read by ``torch.load``."""

_ANNOTATIONS = {
    "from": "str | None",
    "drop": "Sequence[str] | None",
    "rename": "Mapping[str, str] | None",
    "strict": "bool",
    "key": "str | None",
    "checksum": "str | None",
}


@dataclass(frozen=True)
class Initialization:
    """Where the weights of a new run come from.

    Attributes:
        source: Reference to a checkpoint of a run, or path of a file.
        drop: Patterns of names, in the source or in the model, whose weights stay as the model has made them.
        rename: Pattern of names in the source -> the name in the model; each ``*`` stands for the same text in both.
            Of several patterns that match, the first one counts.
        strict: Whether each of the other weights of the source has to fit, and each of the model has to be given.
        key: Entry of a torch file that holds the weights; None if they are its content, or its only entry of the kind.
        checksum: SHA-256 of the file with the weights; a run that starts stores it, and a later one checks it.
    """

    source: str
    drop: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    strict: bool = True
    key: str | None = None
    checksum: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the source is a file, and not a run."""
        return self.source.endswith(FILE_TYPES)

    def drops(self, name: str) -> bool:
        """Whether the weights of a name are not loaded."""
        return matches_any(name, self.drop)

    def renamed(self, name: str) -> str:
        """Return the name in the model of a name in the source."""
        for pattern, new in self.rename.items():
            if match := re.fullmatch("(.*)".join(map(re.escape, pattern.split("*"))), name):
                parts = iter(match.groups())
                return re.sub(r"\*", lambda _, parts=parts: next(parts), new)  # type: ignore[misc]
        return name


def initialization_of(config: Mapping[str, Any]) -> Initialization | None:
    """Return where the weights of a new run come from, or None if they are as the model makes them.

    Raises:
        ConfigError: The settings are none.
    """
    node = config.get(NODE)  # earlier versions stored configs without it
    if node is None:
        return None
    if not isinstance(node, Mapping):
        raise ConfigError(f"a mapping is needed, not {short(node)}. Write {NODE}.from={node}", path=NODE)
    for name, value in node.items():
        if name not in _ANNOTATIONS:
            raise ConfigError(
                f"there is no such setting. {did_you_mean(str(name), _ANNOTATIONS)}", path=f"{NODE}.{name}"
            )
        if problem := mismatch(value, _ANNOTATIONS[name]):
            raise ConfigError(problem, path=f"{NODE}.{name}")
    if (source := node.get("from")) is None:
        return None
    rename = dict(node.get("rename") or {})
    for pattern, new in rename.items():
        if pattern.count("*") != new.count("*"):
            raise ConfigError(f"'{pattern}' and '{new}' need the same number of *", path=f"{NODE}.rename")
    drop = tuple(node.get("drop") or ())
    return Initialization(source, drop, rename, node.get("strict", True), node.get("key"), node.get("checksum"))
