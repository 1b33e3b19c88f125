"""Says in a few lines what a constructor or an import of the user's own code has raised, and where."""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ksuit_runner
from ksuit_runner.errors import ConfigError, Interrupted, KsuitError
from ksuit_runner.paths import shown_path
from ksuit_runner.system.shipped_folders import INSTALLED

_MOST_LINES = 4


@contextmanager
def constructing(path: str | None) -> Iterator[None]:
    """Explain what is raised in the block, where an object of the config is built.

    Args:
        path: Config path of the object; None where it is not known.

    Raises:
        ConfigError: Anything but a KsuitError was raised, which is its cause.
        KsuitError: It was raised in the block, and has got the config path.
    """
    try:
        yield
    except KsuitError as error:
        if path is not None:
            error.locate(path)
        raise
    except Interrupted:
        raise
    except SystemExit as error:
        raise ConfigError(f"it calls sys.exit({error.code!r}) instead of being built", path=path) from error
    except Exception as error:
        raise ConfigError(what_was_raised(error), path=path) from error


def what_was_raised(error: BaseException) -> str:
    """Say what was raised, with its type, and where in the user's own code: other frames would not help."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"({len(lines) - _MOST_LINES + 1} more lines: hydra.verbose=true)"]
    text = f"{type(error).__name__}: " + "\n".join(lines) if lines else type(error).__name__
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    if not frames:
        return text
    where = shown_path(Path(frames[-1].filename))
    return f"{text}\n(raised in {where}, line {frames[-1].lineno}, in {frames[-1].name})"


def _is_own(file: str) -> bool:
    """Whether a file is the user's: neither of this package, nor of an installed one, nor of Python."""
    path = Path(file)
    if file.startswith("<") or not INSTALLED.isdisjoint(path.parts):
        return False
    return not any(
        path.is_relative_to(other) for other in (Path(ksuit_runner.__file__).parent, sysconfig.get_path("stdlib"))
    )
