"""The model in MLflow's format."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.callback_bases.weights import model_with
from ksuit_runner.config.types import TwoOrMore, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, located
from ksuit_runner.models.base import ModelBase
from ksuit_runner.models.mlflow_model import export_program, plain_inputs, write_mlflow_model
from ksuit_runner.system.atomic_files import new_folder
from ksuit_runner.tracker.base import ExportedModel, ModelVersion

_BATCHES = 8  # the first one is the example, and the others show which sizes vary


class ExportModel(DatasetCallback):
    """Writes the model in MLflow's format into ``artifacts/models/NAME/E1_U20_S1440``, and registers it if asked.

    NAME is the name of the callback; other weights are added to the position, as in ``E1_U20_S1440_best_ema``.

    The model is a program of ``torch.export``, for the CPU, with signature and input example, which
    ``mlflow.pytorch.load_model``, ``mlflow models serve`` and, of its file ``data/model.pt2``, ``torch.export.load``
    load without its code. That it can be exported is checked before training. Inputs and outputs are tensors of shape
    (batch, ...), or dicts, lists and tuples of them, by names such as ``input_ids`` or ``latent/mean``. The number of
    samples is left open, and what differs between the first batches of the dataset, such as the length of texts.
    Of a checkpoint that the run lists among MLflow's models (``best_checkpoint``), it is what MLflow loads.

    Args:
        weights: ``model`` for the trained weights, or the name under which others are evaluated, such as ``ema``.
        register_as: Name under which each export becomes a new version in MLflow's registry, once the run has ended;
            None registers nothing.
        alias: Alias that this version gets, such as ``champion``.
        batch_size: Number of samples, the first ones of the dataset, that become the input example.
        **kwargs: Passed on to DatasetCallback. With ``weights_of``, the model is that of a tagged checkpoint.

    Raises:
        ConfigError: There are no such weights, the model cannot be exported, or the tracker has no registry.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        weights: str = "model",
        register_as: str | None = None,
        alias: str | None = None,
        batch_size: TwoOrMore = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, max_batches=_BATCHES, **kwargs)
        self._path = f"callbacks.{self.display_name}"
        check_numbers("TwoOrMore", batch_size=batch_size)  # with one, no dimension is that of the samples
        if alias is not None and register_as is None:
            raise ConfigError("alias: it is given to a registered model; add register_as")
        if register_as is not None and self.data_container.world.records and not self.tracker.has_registry:
            raise ConfigError("register_as: only tracker=mlflow has a registry of models")
        self._weights, self._register_as, self._alias = "" if weights == "model" else weights, register_as, alias

    def _before_training(self, update_counter: UpdateCounter) -> None:
        model_with(self._weights or "model", self.trainer, f"{self._path}.weights")
        self._export(self.trainer.model)

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        parts = [part for part in (self.weights_of, self._weights) if part]
        with self._models() as models, self.trainer.evaluation():  # with the weights that an evaluation sees
            exported = self._export(models["/".join(parts)]) if models else None
        if exported is not None:
            label = "_".join([str(update_counter.progress), *parts]).replace("/", "_")
            path, checkpoint = f"models/{self.display_name}/{label}", self.evaluated_checkpoint(update_counter)
            self._write(path, *exported)
            self.tracker.add_export(ExportedModel(path, checkpoint, self._weights or "model"))

    def _export(self, model: nn.Module) -> tuple[torch.export.ExportedProgram, Any] | None:
        """Return the program, and the example of its inputs; None on a rank that does not record."""
        assert isinstance(model, ModelBase)
        module = model.plain_copy(self.data_container.world)
        if module is None:
            return None
        batches = self.data_container.evaluation_batches(self.dataset_key, self.batch_size, self.max_batches)
        with located(self._path):
            example, *others = [plain_inputs(self.trainer.inputs_and_targets(batch)[0]) for batch in batches]
            return export_program(module.eval(), example, others), example

    def _write(self, path: str, program: torch.export.ExportedProgram, example: Any) -> None:
        self.checkpoint_writer.check_owner()
        with new_folder(self.path_provider.artifacts_dir / path) as folder:
            write_mlflow_model(folder, program, example, self.path_provider.run_id)
        self.logger.info("%s: the model is in %s", self._path, self.path_provider.artifacts_dir / path)
        if self._register_as is not None:
            self.tracker.register_model(ModelVersion(path, self._register_as, self._alias))

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None: ...

    def _process_results(self, update_counter: UpdateCounter) -> None: ...
