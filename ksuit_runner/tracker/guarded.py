"""Guards the methods of a tracker that threads call: one at a time, with errors of one line."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ksuit_runner.errors import ConfigError, TrackerError
from ksuit_runner.security.masking import mask_text

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LONGEST = 300  # characters of a reason


def guarded(
    store: str, *errors: type[Exception]
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Make a decorator for methods of a tracker with a ``_lock``: one thread at a time calls one of them.

    Args:
        store: What the tracker writes to, for messages.
        *errors: What it may raise, which becomes a TrackerError of one line.
    """

    def decorate(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(method)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            tracker: Any = args[0]
            with tracker._lock:
                try:
                    return method(*args, **kwargs)
                except (TrackerError, ConfigError, AssertionError):
                    raise
                except errors as error:
                    lines = mask_text(str(error)).splitlines()
                    reason = next((line.strip() for line in lines if line.strip()), type(error).__name__)
                    raise TrackerError(f"{store}: {reason[:_LONGEST]}") from error

        return call

    return decorate
