"""What a ``_target_`` may name, in a config that was just composed as in one that comes from a tracking server.

Classes of installed packages and of the project's own code. Nothing of Python's standard library and nothing of Hydra,
which could call anything. A function only where a config path allows one, and only one of ksuit_runner or of the
project. What counts is where the object is defined, and not the name under which it is reached.

The check before a run applies this to what it reads from source; the factory applies it to the objects themselves,
before any of them is called.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ksuit_runner
from ksuit_runner.errors import ConfigError, short
from ksuit_runner.system.shipped_folders import INSTALLED, NAME, shipped

_REFUSED = {
    **dict.fromkeys(sys.stdlib_module_names, "Python's standard library"),
    **dict.fromkeys(("hydra", "omegaconf"), "Hydra"),
}
_LONGEST = 300
DEEPEST = 50
"""How many levels of a config may be nested."""
TRUSTED = (
    *("torch.nn", "torch.optim", "torch.utils.data.dataset", "torch.utils.data.sampler"),
    *("torchmetrics.classification", "torchmetrics.regression"),
)
"""Modules whose classes any config may name: building one of them opens no file and starts no program."""
BUILDERS = ("timm.models", "torchvision.models", "datasets.load")
"""Modules of packages whose functions build models or datasets."""
_SHIPPED = (Path(ksuit_runner.__file__).resolve().parent, shipped(NAME))
_WRITTEN = ("runs", "sweeps", ".fetching")


def targets_in(path: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the config path and the target of every object in a part of a config, at any depth.

    Args:
        path: Config path of the part.
        value: The part as plain, resolved values.
        depth: How deep it is nested.

    Raises:
        ConfigError: It is nested too deep, or a text in it would be resolved again, and change.
    """
    if depth > DEEPEST:
        raise ConfigError(f"more than {DEEPEST} levels are nested here", path=short(path))
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{short(value)} is not resolved; a value must not contain '${{'", path=path)
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield path, value["_target_"]
        for key, item in value.items():
            if "${" in str(key):
                raise ConfigError("a key must not contain '${'", path=path)
            yield from targets_in(f"{path}.{key}", item, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from targets_in(f"{path}[{index}]", item, depth + 1)


def check_values(values: Mapping[Any, Any]) -> None:
    """Check that a whole config is not nested too deep, and that no text in it would be resolved again.

    Raises:
        ConfigError: One of these does not hold.
    """
    for path, value in values.items():
        if "${" in str(path):
            raise ConfigError("a key must not contain '${'", path=short(path))
        for _ in targets_in(str(path), value):
            pass


def check_name(target: Any) -> str:
    """Return a target's dotted name if nothing in it is refused, before anything of it is imported.

    Raises:
        ConfigError: It is not a dotted name, reaches into Python's own attributes, or belongs to the standard library
            or to Hydra.
    """
    if not isinstance(target, str) or len(target) > _LONGEST or not _is_dotted(target):
        raise ConfigError(f"{short(target)} is not a dotted name like package.module.Class")
    if hidden := next((part for part in target.split(".") if part.startswith("__")), None):
        raise ConfigError(f"'{target}' reaches into '{hidden}'; write a class of a module")
    check_module(target, target)
    return target


def check_module(target: str, module: str) -> None:
    """Check the module that a target is defined in.

    Args:
        target: Its name in the config.
        module: Name of the module, or of something in it; empty if the object has none.

    Raises:
        ConfigError: It belongs to the standard library or to Hydra.
    """
    owner = _REFUSED.get(module.partition(".")[0])
    if owner is not None:
        name = f"'{target}'" if module == target else f"'{target}', defined in '{module}',"
        raise ConfigError(
            f"{name} belongs to {owner}; only the project's classes and those of packages are accepted here"
        )


def check_function(target: str, is_allowed: bool, module: str, file: str | None, name: str = "") -> None:
    """Check a target that is not a class.

    Args:
        target: Its name in the config.
        is_allowed: Whether the config path takes functions at all.
        module: Name of the module that it is defined in.
        file: File of that module.
        name: Its name inside of that module, with dots for what is nested in classes.

    Raises:
        ConfigError: A function may not stand there, or not this one.
    """
    if not is_allowed:
        raise ConfigError(f"'{target}' is a function; only a class is accepted here")
    if module.partition(".")[0] == "ksuit_runner" or _is_own(file):
        return
    owner, _, last = name.rpartition(".")
    is_constructor = bool(owner) and last.startswith("from_")
    is_builder = any(f"{module}.".startswith(f"{entry}.") for entry in BUILDERS) and not name.startswith("_")
    if not is_constructor and not is_builder:
        raise ConfigError(
            f"'{target}' is a function of a package; of those, only constructors such as Class.from_pretrained and the "
            f"builders of {', '.join(BUILDERS)} are accepted here, besides functions of ksuit_runner and of the project"
        )


@dataclass(frozen=True)
class Trust:
    """What a config may name that was not composed here: what comes back from a run's folder or a server is data.

    Its targets are shipped, the project's own, or of packages that the user trusts, except where the command line has
    changed it. A config that was composed, or is known to be this user's, has no such limits.

    Attributes:
        packages: Packages or modules that the user trusts besides TRUSTED.
        outputs: The output folder, in which no code of the project is, even if it is below the working directory.
        changes: config paths that the command line has changed.
    """

    packages: tuple[str, ...]
    outputs: Path
    changes: tuple[str, ...] = ()

    def check_name(self, path: str, target: str) -> None:
        """Check the package that a target is reached through, before anything of it is imported.

        Args:
            path: Config path of the object.
            target: Its target.

        Raises:
            ConfigError: It is neither shipped nor the project's own, and the user does not trust it.
        """
        top = target.partition(".")[0]
        if self._is_changed(path) or any(top == entry.partition(".")[0] for entry in (*TRUSTED, *self.packages)):
            return
        try:
            spec = find_spec(top)
        except (ImportError, ValueError):
            spec = None
        files = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
        if not any(self._is_of_project(file) for file in files):
            raise self._refusal(target, top)

    def check_definition(self, path: str, target: str, module: str, file: str | None) -> None:
        """Check where a target is defined.

        Args:
            path: Config path of the object.
            target: Its name in the config.
            module: Name of the module that it is defined in.
            file: File of that module.

        Raises:
            ConfigError: That is neither shipped nor the project's own, and the user does not trust it.
        """
        entries = (*TRUSTED, *self.packages)
        is_listed = any(module == entry or module.startswith(f"{entry}.") for entry in entries)
        if not (is_listed or self._is_changed(path) or self._is_of_project(file)):
            raise self._refusal(target, module)

    def check_function(self, path: str, target: str, module: str, asks: bool) -> None:
        """Check a target that is not a class: any function of the project could be one that deletes files.

        Args:
            path: Config path of the object.
            target: Its name in the config.
            module: Name of the module that it is defined in.
            asks: Whether it asks for something that the runner provides there, and so was made for it.

        Raises:
            ConfigError: It does not, and the user has not named it.
        """
        is_listed = any(f"{module}.".startswith(f"{entry}.") for entry in self.packages)
        if not (asks or is_listed or self._is_changed(path)):
            raise ConfigError(
                f"'{target}' is a function, and this config was not made by you on this machine. "
                f"If you trust what it does: 'trust=[{module}]'"
            )

    def _is_changed(self, path: str) -> bool:
        return f"{path}._target_" in self.changes or any(
            path == change or path.startswith((f"{change}.", f"{change}[")) for change in self.changes
        )

    def _is_of_project(self, file: str | None) -> bool:
        if file is None:
            return False
        path, project, outputs = Path(file).resolve(), Path.cwd().resolve(), self.outputs.resolve()
        if any(path.is_relative_to(folder) for folder in _SHIPPED):
            return True
        # Where the output folder is the project's or contains it, only the runs are excluded.
        apart = [outputs] if not project.is_relative_to(outputs) else [outputs / name for name in _WRITTEN]
        return _is_own(file) and not any(path.is_relative_to(folder) for folder in apart)

    @staticmethod
    def _refusal(target: str, module: str) -> ConfigError:
        package = module.partition(".")[0]
        return ConfigError(
            f"'{target}' is from the package '{package}', and this config was not made by you on this machine. "
            f"If you trust what it says: 'trust=[{package}]'"
        )


def _is_own(file: str | None) -> bool:
    """Whether a file belongs to the project: it lies below the working directory and was not installed there."""
    if file is None:
        return False
    path, project = Path(file).resolve(), Path.cwd().resolve()
    return path.is_relative_to(project) and not INSTALLED & set(path.relative_to(project).parts)


def _is_dotted(text: str) -> bool:
    return "." in text and all(part.isidentifier() for part in text.split("."))
