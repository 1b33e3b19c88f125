"""Checks that an optional package is installed."""

from importlib.util import find_spec

from ksuit_runner.errors import ConfigError


def require_package(package: str, chosen: str = "", path: str | None = None) -> None:
    """Check that an optional package is installed, before anything is created.

    Args:
        package: Name of the module, and of the extra of this project that installs it.
        chosen: Choice on the command line that needs it, such as ``launcher=ray``.
        path: Config path of what needs it.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec(package) is None:
        where = f"{chosen}: " if chosen else ""
        raise ConfigError(f"{where}'{package}' is not installed. pip install 'ksuit_runner[{package}]'", path=path)
