"""Features of layers, as a file."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from safetensors.torch import save_file
from torch import Tensor

from ksuit_runner.callback_bases.feature import FeatureCallback
from ksuit_runner.counter import UpdateCounter


class FeatureDump(FeatureCallback):
    """Logs the features of a dataset as a file, ``NAME/DATASET``, for the live and all other weights.

    It is a safetensors file with the features of each layer, of shape (samples, ...), in the order of the dataset:
    ``LAYER`` for the live weights and ``WEIGHTS/LAYER`` for others. It also has the ``targets``, if they are a tensor.
    All of it is held in memory until it is written, which ``max_batches`` can limit.

    Args:
        **kwargs: Passed on to FeatureCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def _process_results(self, update_counter: UpdateCounter) -> None:
        if not self.data_container.world.records:
            return
        found: dict[str, Tensor] = {
            "/".join(filter(None, (item.weights, item.layer))): item.values.cpu().contiguous()
            for item in self.features()
        }
        if "targets" in self.gathered.rows:
            found["targets"] = self.gathered.rows["targets"].cpu().contiguous()
        with TemporaryDirectory() as folder:
            path = Path(folder, "features.safetensors")
            save_file(found, path)
            self.writer.add_file(f"{self.display_name}/{self.dataset_key}", path)
