"""Writes files of weights alone in the background, and keeps the newest ones."""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from ksuit_runner.checkpoint.host_buffers import HostBuffers
from ksuit_runner.checkpoint.tensor_file import write_tensors
from ksuit_runner.counter import Progress
from ksuit_runner.system.atomic_files import new_folder


class WeightsWriter:
    """Writes weights into a folder for each position, such as ``E1_U20_S1440/model.safetensors``.

    Training waits for the copy into host memory, and for what was written before.

    Args:
        folder: Where these folders are.
        keep_last: How many are kept, the newest ones; None keeps all.
        check_owner: Raises an error if another process has taken the run over; called before every change.
    """

    def __init__(self, folder: Path, keep_last: int | None, check_owner: Callable[[], None]) -> None:
        self._folder, self._keep_last, self._check_owner = folder, keep_last, check_owner
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-writer")
        self._written: Future[None] | None = None

    def write(self, progress: Progress, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take a copy of weights and write it in the background.

        Args:
            progress: The position.
            weights: Dense tensors by name, for each file without its suffix.

        Raises:
            OSError: The weights before these could not be written; these are on their way.
        """
        before, self._written = self._written, None
        error = None if before is None else before.exception()
        copies = self._buffers.copy(weights)
        self._written = self._thread.submit(self._write, progress, copies)
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: The last weights could not be written.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def remove_after(self, update: int) -> None:
        """Remove what was written after an update, to which a resume has gone back."""
        for progress in self._there():
            if progress.update > update:
                self._remove(progress)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _write(self, progress: Progress, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._check_owner()
        with new_folder(self._folder / str(progress)) as folder:
            for name, tensors in weights.items():
                write_tensors(folder / f"{name}.safetensors", tensors)
        if self._keep_last is not None:
            for old in self._there()[: -self._keep_last]:
                self._remove(old)

    def _there(self) -> list[Progress]:
        """Return what is written, oldest first."""
        found = [Progress.parse(path.name) for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted((item for item in found if item is not None), key=lambda item: item.update)

    def _remove(self, progress: Progress) -> None:
        self._check_owner()
        shutil.rmtree(self._folder / str(progress), ignore_errors=True)
