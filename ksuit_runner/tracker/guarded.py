"""Guards the methods of a tracker that threads call: one at a time, with errors of one line."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ksuit_runner.errors import ConfigError, TrackerError
from ksuit_runner.security.masking import mask_text

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LONGEST = 300  # characters of a reason


def guarded(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Have one thread at a time call such a method, and errors of the store be a TrackerError of one line.

    The tracker has a ``_lock``, the name of its store for messages in ``_STORE``, and what that may raise in
    ``_ERRORS``.
    """

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        tracker: Any = args[0]
        with tracker._lock:
            try:
                return method(*args, **kwargs)
            except (TrackerError, ConfigError, AssertionError):
                raise
            except tracker._ERRORS as error:
                lines = mask_text(str(error)).splitlines()
                reason = next((line.strip() for line in lines if line.strip()), type(error).__name__)
                raise TrackerError(f"{tracker._STORE}: {reason[:_LONGEST]}") from error

    return call
