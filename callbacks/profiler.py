"""A trace of what some updates do, from torch.profiler."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ksuit_runner.callback_bases.window import WindowCallback
from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.engine.phases import Phases


class Profiler(WindowCallback):
    """Logs a trace of some updates, as the file ``time/trace``, and their most expensive operators, as a text.

    The trace is gzipped JSON of ``torch.profiler``, which https://ui.perfetto.dev and chrome://tracing show; it names
    data, forward, backward, step, the log, checkpoints and each callback. The text is ``time/operators``. Of several
    ranks, rank 0 is watched. Updates that are watched take longer.

    Args:
        phases: Tells when the phases of an update begin and end.
        record_shapes: Record the shapes of inputs.
        profile_memory: Record what is allocated and freed.
        with_stack: Record the lines of Python that call the operators.
        rows: Rows of the text.
        **kwargs: Passed on to WindowCallback.

    Raises:
        ConfigError: A number is smaller than 1.
    """

    def __init__(
        self,
        phases: Phases,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        rows: PositiveInt = 30,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveInt", rows=rows)
        self._rows = rows
        self._is_on_cuda = self.trainer.device.type == "cuda"
        self._new_profile: Callable[[], profile] = partial(
            profile,
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_on_cuda else [])],
            record_shapes=record_shapes,
            profile_memory=profile_memory,
            with_stack=with_stack,
        )
        self._profile = self._new_profile()
        self._names: list[record_function] = []
        phases.watch(self)

    def begin(self, phase: str) -> None:
        """Name what follows in the trace."""
        if self.is_watching:
            self._names.append(record_function(phase))
            self._names[-1].__enter__()  # type: ignore[no-untyped-call]

    def end(self, phase: str) -> None:
        """End what was named last; not if it has begun before the trace."""
        if self._names:
            self._names.pop().__exit__(None, None, None)

    def _start(self) -> bool:
        if torch._C._autograd._profiler_enabled():
            self.logger.warning("an update is not watched, as another profiler is at work")
            return False
        self._profile = self._new_profile()
        self._profile.start()
        return True

    def _log(self) -> None:
        self.close()  # a profile is complete once it has ended
        sort_by = "self_device_time_total" if self._is_on_cuda else "self_cpu_time_total"
        self.writer.add_text(
            "time/operators", self._profile.key_averages().table(sort_by=sort_by, row_limit=self._rows)
        )
        with TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            self._profile.export_chrome_trace(str(path))
            self.writer.add_file("time/trace", path)

    def _stop(self) -> None:
        while self._names:
            self._names.pop().__exit__(None, None, None)
        self._profile.stop()
