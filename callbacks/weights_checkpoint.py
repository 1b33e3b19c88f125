"""Weights alone, beside the checkpoints that a run resumes from."""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ksuit_runner.checkpoint.host_buffers import HostBuffers
from ksuit_runner.checkpoint.tensor_file import fits_file, write_tensors
from ksuit_runner.counter import Progress, UpdateCounter
from ksuit_runner.distributed.pieces import gathered, local
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.models.average import is_in
from ksuit_runner.models.base import ModelBase
from ksuit_runner.periodic_callback import PeriodicCallback
from ksuit_runner.system.atomic_files import commit_folder
from ksuit_runner.tensors.name_patterns import matching_modules


class WeightsCheckpoint(PeriodicCallback):
    """Writes weights into files of their own, ``artifacts/weights/NAME/E1_U20_S1440/WEIGHTS.safetensors``.

    NAME is the name of the callback, WEIGHTS is ``model`` or the name of an average. The tensors have the names that
    they have in the ``state_dict`` of the plain module, which loads them; so does ``model.initialize.from``. The
    weights are those that an evaluation sees. Training waits for a copy into host memory only; what is written while
    the disk is full is missing afterwards, with an error in the log.

    Args:
        weights: Which weights: ``model`` for the live ones, or names under which averages are evaluated, such as
            ``ema``.
        modules: Patterns of the names of the modules whose tensors are written, such as ``encoder``; None writes all.
        keep_last: How many of these checkpoints are kept, the newest ones; None keeps all.
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: There are no such weights or modules, keep_last is below 1, or no such file can hold a tensor.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        weights: Sequence[str] = ("model",),
        modules: Sequence[str] | None = None,
        keep_last: int | None = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not weights or (keep_last is not None and keep_last < 1):
            raise ConfigError(f"weights needs a name, and keep_last 1 or more, not {list(weights)} and {keep_last}")
        path = f"callbacks.{self.display_name}.modules"
        names = [name for name, _ in self.model.module.named_modules() if name]
        self._chosen = None if modules is None else matching_modules(modules, names, path)
        self._weights, self._keep_last = weights, keep_last
        self._folder = self.path_provider.artifacts_dir / "weights" / self.display_name
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self.display_name)
        self._written: Future[None] | None = None

    def _before_training(self, update_counter: UpdateCounter) -> None:
        offered = {name or "model" for name in self.trainer.evaluation_models}
        for name in self._weights:
            if name not in offered:
                path = f"callbacks.{self.display_name}.weights"
                raise ConfigError(f"there are no weights '{name}'. {did_you_mean(name, offered)}", path=path)
        if self._writes:  # those that follow are written again
            for progress in self._there():
                if progress.update > update_counter.update:
                    shutil.rmtree(self._folder / str(progress), ignore_errors=True)

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        if self.writer.prefix:  # evaluate= is not training
            return
        with self.trainer.evaluation():
            files = {f"{name}.safetensors": self._tensors(name) for name in self._weights}
            self._wait()
            if self._writes:
                files = self._buffers.copy(files)
        if self._writes:
            self._written = self._thread.submit(partial(self._write, update_counter.progress, files))

    @property
    def _writes(self) -> bool:
        return self.data_container.world.records and not self.writer.prefix

    def _tensors(self, name: str) -> dict[str, Tensor]:
        model = self.trainer.evaluation_models["" if name == "model" else name]
        assert isinstance(model, ModelBase)
        named = {key: value for key, value in model.tensors().items() if is_in(key, self._chosen)}
        for key, value in named.items():
            if not (isinstance(value, Tensor) and fits_file(local(value))):
                path = f"callbacks.{self.display_name}.modules"
                raise ConfigError(f"'{key}' is no dense tensor, and no such file can hold it: choose others", path=path)
        return {key: gathered(value, self.data_container.world) for key, value in named.items()}

    def _write(self, progress: Progress, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        folder = self._folder / str(progress)
        partial_folder = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        for name, tensors in files.items():
            write_tensors(partial_folder / name, tensors)
        shutil.rmtree(folder, ignore_errors=True)
        commit_folder(partial_folder, folder)
        if self._keep_last is not None:
            for old in self._there()[: -self._keep_last]:
                shutil.rmtree(self._folder / str(old), ignore_errors=True)

    def _there(self) -> list[Progress]:
        """Return what is written, oldest first."""
        found = [Progress.parse(path.name) for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted((item for item in found if item is not None), key=lambda item: item.update)

    def _wait(self) -> None:
        written, self._written = self._written, None
        try:
            if written is not None:
                written.result()
        except OSError as error:
            self.logger.error("the weights could not be written to %s: %s", self._folder, error)

    def _after_training(self, update_counter: UpdateCounter) -> None:
        self._wait()

    def close(self) -> None:
        """Wait until everything is written."""
        self._wait()
        self._thread.shutdown()
