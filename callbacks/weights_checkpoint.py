"""Weights alone, beside the checkpoints that a run resumes from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.callback_bases.weights import model_with
from ksuit_runner.checkpoint.tensor_file import fits_file
from ksuit_runner.checkpoint.weights_writer import WeightsWriter
from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.distributed.pieces import gathered, local
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.average import is_in
from ksuit_runner.tensors.name_patterns import matching_modules


class WeightsCheckpoint(PeriodicCallback):
    """Writes weights into files of their own, ``artifacts/weights/NAME/E1_U20_S1440/WEIGHTS.safetensors``.

    NAME is the name of the callback, WEIGHTS is ``model`` or the name of an average. The tensors are named as in the
    ``state_dict`` of the plain module, which can load them, as can ``model.initialize.from``. The weights are those
    that an evaluation sees. Training waits only for a copy into host memory. A file that does not fit on a full disk is
    missing afterwards, and an error in the log says so.

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
        keep_last: PositiveInt | None = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveInt", keep_last=keep_last)
        if not weights:
            raise ConfigError("weights: one name or more is needed")
        self._path = f"callbacks.{self.display_name}"
        names = [name for name, _ in self.model.module.named_modules() if name]
        self._chosen = None if modules is None else matching_modules(modules, names, f"{self._path}.modules")
        self._weights = weights
        self._folder = self.path_provider.artifacts_dir / "weights" / self.display_name
        self._writer = WeightsWriter(self._folder, keep_last, self.checkpoint_writer.check_owner)

    def _before_training(self, update_counter: UpdateCounter) -> None:
        for name in self._weights:
            model_with(name, self.trainer, f"{self._path}.weights")
        if self._writes:
            self._writer.remove_after(update_counter.update)

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        with self.trainer.evaluation(), self._failure_is_logged():
            weights = {name: self._tensors(name) for name in self._weights}
            if self._writes:
                self._writer.write(update_counter.progress, weights)

    @property
    def _writes(self) -> bool:
        return self.data_container.world.records and not self.writer.prefix  # evaluate= is not training

    def _tensors(self, name: str) -> dict[str, Tensor]:
        model = model_with(name, self.trainer, f"{self._path}.weights")
        named = {key: value for key, value in model.tensors().items() if is_in(key, self._chosen)}
        for key, value in named.items():
            if not (isinstance(value, Tensor) and fits_file(local(value))):
                what = f"'{key}' is no dense tensor, and no such file can hold it: choose others"
                raise ConfigError(what, path=f"{self._path}.modules")
        return {key: gathered(value, self.data_container.world) for key, value in named.items()}

    @contextmanager
    def _failure_is_logged(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.logger.error("the weights could not be written to %s: %s", self._folder, error)

    def _after_training(self, update_counter: UpdateCounter) -> None:
        with self._failure_is_logged():
            self._writer.wait()

    def close(self) -> None:
        """Wait until everything is written."""
        with self._failure_is_logged():
            self._writer.wait()
        self._writer.close()
