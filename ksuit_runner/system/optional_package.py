"""Checks that an optional package is installed."""

from importlib.util import find_spec
from typing import Final

from ksuit_runner.errors import ConfigError

EXTRAS: Final = {
    "torchmetrics": "metrics",
    "pynvml": "gpu",
    "apprise": "notify",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}
"""Extras of this project whose names are not those of the packages that they install, by the package."""


def require_package(package: str, chosen: str = "", path: str | None = None) -> None:
    """Check that an optional package is installed, before anything is created.

    Args:
        package: Name of the module; an extra of this project installs it, mostly of the same name.
        chosen: Choice on the command line that needs it, such as ``launcher=ray``.
        path: Config path of what needs it.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec(package) is None:
        where = f"{chosen}: " if chosen else ""
        raise ConfigError(f"{where}{not_installed(package)}", path=path)


def not_installed(package: str) -> str:
    """Say that a package is not installed, and how it is."""
    return f"'{package}' is not installed. pip install 'ksuit_runner[{EXTRAS.get(package, package)}]'"
