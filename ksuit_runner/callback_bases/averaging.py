"""Base class of callbacks that average the weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.checkpoint.format import read_weights
from ksuit_runner.checkpoint.tensor_file import fits_file
from ksuit_runner.config.types import NonNegativeInt, PositiveInt, check_numbers
from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.distributed.pieces import local
from ksuit_runner.errors import CheckpointError, ConfigError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.models.average import ModelTensors, has_average, is_in, share_the_rest
from ksuit_runner.models.base import ModelBase
from ksuit_runner.paths import PathProvider
from ksuit_runner.tensors.layout import Strides, write
from ksuit_runner.tensors.name_patterns import matching, matching_modules


class AveragingCallback(CallbackBase):
    """Maintains averages of the weights, and offers them for evaluation beside the live ones.

    Until averaging begins, an average is the live weights. Then it is a copy of them that moves towards them at
    intervals. Only parameters are averaged. Buffers, such as running statistics, are always those of the live model:
    they may be counts, or masks with infinities, which have no average.

    Args:
        modules: Patterns of the names of modules, such as ``encoder`` or ``blocks.{}``: only these are averaged, and
            the rest of the model is the live one, without a copy. By default all of it is averaged.
        average_buffers: Average the floating-point buffers, too, such as the running statistics of BatchNorm.
        start_epoch: Begin after this epoch.
        start_update: Begin after this update. Where both are given, the later one counts.
        every_n_epochs: After the start, move towards the live weights after every n-th epoch.
        every_n_updates: Move towards them after every n-th update. Where both are given, whenever one of them is due;
            by default after every update.
        **kwargs: Passed on to CallbackBase.

    Attributes:
        updates: How often the averages have moved.
        models: The averages by name.

    Raises:
        ConfigError: A pattern matches no module, a number is out of range, or the run has no epochs.
    """

    logs: ClassVar[Sequence[str] | None] = ()
    offers: ClassVar[Sequence[str] | None] = ("{name}",)

    def __init__(
        self,
        modules: Sequence[str] | None = None,
        average_buffers: bool = False,
        start_epoch: NonNegativeInt = 0,
        start_update: NonNegativeInt = 0,
        every_n_epochs: PositiveInt | None = None,
        every_n_updates: PositiveInt | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._patterns, self._averages_buffers = modules, average_buffers
        if modules is not None:
            matching_modules(modules, self._module_names(), f"callbacks.{self.display_name}.modules")
        self._start = self._start_of(start_epoch, start_update)
        self._interval: Interval | None = None  # None: every update, which costs nothing to ask
        if every_n_epochs is not None or every_n_updates is not None:
            self._interval = Interval(every_n_epochs, every_n_updates)
            self._interval.check(self.trainer.counter, f"callbacks.{self.display_name}")
        self.updates = 0
        self._has_begun, self._is_restored = self._start == 0, False
        self._strides: dict[str, Strides] = {}
        self.models = {label: self._copy() for label in self._labels()}
        for label, average in self.models.items():
            self.trainer.add_evaluation_model(label, average)
            self.checkpoint_writer.add_tensors(label, partial(self._in_file, average), of_model=True)
        self._pair()

    def _start_of(self, epoch: int, update: int) -> int:
        """Return the update of the start."""
        check_numbers("NonNegativeInt", start_epoch=epoch, start_update=update)
        counter = self.trainer.counter
        if epoch and not counter.has_epochs:
            raise ConfigError("start_epoch: the training data has no epochs; use start_update")
        return max(epoch * counter.updates_per_epoch if epoch else 0, update)

    def _labels(self) -> Sequence[str]:
        """Return the names of the averages, under which they are evaluated and stored."""
        return [self.display_name]

    @abstractmethod
    def _share(self, label: str) -> float:
        """Return the share of the live weights in an average that moves for the ``updates``-th time."""

    def _before_training(self, update_counter: UpdateCounter) -> None:
        if not self._is_restored:  # a resume that adds this callback has loaded weights since it was made
            self._begin(update_counter)

    @quiet
    @uses_no_rng
    def _track_after_update_step(self, update_counter: UpdateCounter) -> None:
        self.model.kept_buffers.put_back()  # a callback before this one may have computed with the model
        is_due = self._has_begun and (self._interval is None or self._interval.is_due(update_counter))
        if is_due:
            self.updates += 1
        elif not self._has_begun and update_counter.update >= self._start:
            self._begin(update_counter)
        has_changed = self._live.tree.has_changed()
        if has_changed and self._live.tree.has_other_structure():
            self._follow()
        for label, average in self._averages.items():
            average.move_towards(self._live, self._share(label) if is_due else None, has_changed)

    def _begin(self, update_counter: UpdateCounter) -> None:
        """Copy the live weights, of which the averages may have had the very tensors, and average from now on."""
        self._has_begun = update_counter.update >= self._start
        for average in self.models.values():
            average.module = self._copy().module
        self._pair()

    def _copy(self) -> ModelBase:
        return self.model.copy().eval().requires_grad_(False)

    def _module_names(self) -> list[str]:
        return [name for name, _ in self.model.module.named_modules() if name]

    def _chosen(self) -> list[str] | None:
        """Return the names of the modules that are averaged at present; None for all of them."""
        if not self._has_begun:
            return []
        if self._patterns is None:
            return None
        names = self._module_names()
        return [name for pattern in self._patterns for name in matching(pattern, names)]

    def _pair(self) -> None:
        """Pair the tensors of the averages with those of the model."""
        chosen = self._chosen()
        for average in self.models.values():
            share_the_rest(average.module, self.model.module, chosen)
        self._live = ModelTensors(self.model.module, chosen)
        self._averages = {
            label: ModelTensors(average.module, chosen, self._averages_buffers)
            for label, average in self.models.items()
        }

    def _follow(self) -> None:
        """Replace what was replaced in the model; an average continues under its name or starts anew."""
        for average in self.models.values():
            before = dict(average.module.named_parameters())
            average.module = self._copy().module
            for name, parameter in average.module.named_parameters():
                if name in before and before[name].shape == parameter.shape and has_average(parameter):
                    write(local(parameter), local(before[name]))
        self._pair()

    def _in_file(self, average: ModelBase) -> dict[str, Tensor]:
        """Return the tensors of an average that a checkpoint has in its file; what it lacks is the model's."""
        chosen = self._chosen() if self._has_begun else None
        return {name: item for name, item in average.tensors().items() if fits_file(item) and is_in(name, chosen)}

    def state_dict(self) -> dict[str, Any]:
        """Return how far the averages are, and their memory layouts; their values are in files."""
        strides = {label: average.arrangement()["strides"] for label, average in self.models.items()}
        return {"updates": self.updates, "has_begun": self._has_begun, "strides": strides}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore how far the averages are, and the layouts."""
        self.updates, self._strides = state_dict["updates"], state_dict.get("strides", {})
        self._has_begun, self._is_restored = state_dict.get("has_begun", True), True

    def resume_from_checkpoint(self, resumption_paths: PathProvider, model: ModelBase) -> None:
        """Restore the averages from the checkpoint's files; what has no average and is in no file is the model's."""
        for label, average in self.models.items():
            path = resumption_paths.checkpoint_dir / f"{label}.safetensors"
            if not path.is_file():
                raise CheckpointError(f"{path} is missing", path=f"callbacks.{self.name}")
            average.module = self._copy().module
            average.load({**average.tensors(), **read_weights(path.parent, label)}, average.arrangement())
            if label in self._strides:
                average.arrange({**average.arrangement(), "strides": self._strides[label]})
        self._pair()
