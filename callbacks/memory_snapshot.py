"""What is in the memory of the GPU, and who has allocated it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ksuit_runner.callback_bases.window import WindowCallback
from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.errors import ConfigError


class MemorySnapshot(WindowCallback):
    """Logs what the memory of a CUDA device holds, and which code has allocated and freed it, as the file ``memory``.

    https://pytorch.org/memory_viz shows the file. It covers some updates in a row. A run that fails because the memory
    is full logs what was in it: with its history within these updates, and without it after them. On several ranks it
    is the device of rank 0. The file is a pickle of torch, which nothing here reads.

    Args:
        max_entries: Largest number of allocations and frees to keep, the last ones.
        **kwargs: Passed on to WindowCallback.

    Raises:
        ConfigError: The run is on no CUDA device, or a number is smaller than 1.
    """

    def __init__(self, max_entries: PositiveInt = 100_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveInt", max_entries=max_entries)
        if self.trainer.device.type != "cuda":
            raise ConfigError(f"torch records the memory of CUDA devices, and this run is on '{self.trainer.device}'")
        self._max_entries = max_entries

    def _start(self) -> bool:
        torch.cuda.memory._record_memory_history(max_entries=self._max_entries)
        return True

    def _log(self) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder, "memory.pickle")
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
            self.writer.add_file("memory", path)

    def _stop(self) -> None:
        torch.cuda.memory._record_memory_history(enabled=None)

    def _on_exception(self, error: BaseException) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._log()
