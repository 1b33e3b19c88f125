"""A message when a run has ended."""

import os
from collections.abc import Sequence
from signal import Signals
from typing import Any, ClassVar, Literal

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.security.masking import mask_text
from ksuit_runner.system.optional_package import require_package
from ksuit_runner.ui.formats import format_number


class Notify(CallbackBase):
    """Sends a message at the end of a run, by mail, chat or push, through Apprise.

    It says how the run has ended (finished, failed with which error, interrupted by which signal), where, and the last
    values of metrics that have a better direction. A message that cannot be sent is a warning. A process that is killed
    sends none.

    Args:
        variable: Name of the environment variable with the addresses, separated by spaces. They contain passwords and
            tokens, and so are no part of the config. See https://github.com/caronc/apprise/wiki.
        ends: The kinds of end that a message is sent for.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: Apprise is not installed, the variable is not set, or it has an address of no known kind.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        variable: str = "KSUIT_NOTIFY_URLS",
        ends: Sequence[Literal["finished", "failed", "interrupted"]] = ("finished", "failed", "interrupted"),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_package("apprise", path=f"callbacks.{self.display_name}")
        from apprise import Apprise

        addresses = os.environ.get(variable, "").split()
        if not addresses:
            raise ConfigError(
                f"variable: the environment variable {variable} has to have an address, such as ntfy://TOPIC"
            )
        self._ends, self._sender = ends, Apprise()
        for number, address in enumerate(addresses, 1):
            if not self._sender.add(address):  # which is not shown, as it may contain a password
                raise ConfigError(f"variable: address {number} in {variable} is of no kind that Apprise knows")
        self._counter: UpdateCounter | None = None
        self._end = "interrupted"
        self._reason = ""

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._counter = update_counter

    def _after_training(self, update_counter: UpdateCounter) -> None:
        self._end = "finished"

    def _on_exception(self, error: BaseException) -> None:
        self._end, self._reason = "failed", mask_text(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Send the message, after the last checkpoint."""
        counter, self._counter = self._counter, None
        if counter is None or self._end not in self._ends or not self.data_container.world.records:
            return
        if (number := self.data_container.interruption.signal) is not None and self._end == "interrupted":
            self._reason = f"by {Signals(number).name}"
        values = {key: item.last for key, item in self.writer.summary.items() if item.direction != "neutral"}
        lines = [
            self._reason,
            f"update {counter.update}/{counter.end_update}",
            *[f"{key} {format_number(value)}" for key, value in values.items()],
        ]
        title = f"run {self.path_provider.run_id} {self._end}"
        try:
            is_sent = bool(self._sender.notify(title=title, body="\n".join(filter(None, lines))))
        except Exception as error:  # of one of a hundred services
            self.logger.warning("the message could not be sent: %s", mask_text(f"{error!r}"))
        else:
            if not is_sent:
                self.logger.warning("the message could not be sent")
