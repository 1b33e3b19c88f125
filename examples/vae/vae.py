"""A variational autoencoder: losses by name, images of what it has learnt, and a linear probe of its codes.

D. P. Kingma and M. Welling, "Auto-Encoding Variational Bayes", 2014.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ksuit_runner import DatasetCallback, SgdTrainer, UpdateCounter


class Vae(nn.Module):
    """Encodes an image as a normal distribution, and decodes a sample of it.

    Args:
        input_shape: (channels, height, width) of the images, whose values are from 0 to 1; filled in from the data.
        latent_dim: Size of the latent code.
        hidden_dim: Width of the hidden layers.
    """

    def __init__(self, input_shape: tuple[int, ...], latent_dim: int, hidden_dim: int) -> None:
        super().__init__()
        pixels = input_shape[0] * input_shape[1] * input_shape[2]
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden_dim), nn.GELU())
        self.distribution = nn.Linear(hidden_dim, 2 * latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, pixels),
            nn.Sigmoid(),
            nn.Unflatten(1, input_shape),
        )

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Return ``reconstruction``, of the images' shape, and ``latent``, mean and log variance of (images, dim) each.

        In training the code is drawn from the distribution; otherwise it is the mean.
        """
        mean, log_variance = self.distribution(self.encoder(images)).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return {"reconstruction": self.decoder(code), "latent": {"mean": mean, "log_variance": log_variance}}


class VaeTrainer(SgdTrainer):
    """Minimizes the sum of two losses, whose weights are ``trainer.loss_weights``."""

    def training_step(self, batch: Any, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
        """Return both losses, means over the images, and the outputs, which callbacks know by their names."""
        images, _ = batch
        outputs = model(images)
        mean, log_variance = outputs["latent"]["mean"], outputs["latent"]["log_variance"]
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        distance = self.loss(outputs["reconstruction"], images).flatten(1).sum(1)
        self.writer.add_scalar("active_dimensions", (mean.std(0) > 0.1).sum())
        return {"reconstruction": distance.mean(), "kl": kl.mean()}, outputs


class Reconstructions(DatasetCallback):
    """Logs the first images of a dataset above their reconstructions, and a histogram of all codes.

    Args:
        count: Number of images.
        **kwargs: Passed on to DatasetCallback.
    """

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count
        self._rows: Tensor | None = None
        self._codes: list[Tensor] = []

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        images, _ = batch
        outputs = self.trainer.predict(images)
        self._codes.append(outputs["latent"]["mean"])
        if self._rows is None:  # two rows of images beside each other, as one image
            rows = [row[: self.count] for row in (images, outputs["reconstruction"])]
            self._rows = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)

    def _process_results(self, update_counter: UpdateCounter) -> None:
        self.writer.add_image(f"reconstructions/{self.dataset_key}", self._rows)
        self.writer.add_histogram(f"codes/{self.dataset_key}", torch.cat(self._codes), bins=20)
        # This draw is keyed by seed, callback and update: it disturbs nothing, and is the same after a resume.
        codes = torch.randn(self.count**2, self.model.module.latent_dim, device=self.trainer.device)
        self.writer.add_image("samples", self.model.module.decoder(codes))
        self._rows, self._codes = None, []


class Probe(DatasetCallback):
    """Logs ``accuracy_probe/DATASET``: that of a linear classifier on the codes of a dataset.

    It is fitted to one half by least squares, and tested on the other: G. Alain and Y. Bengio, "Understanding
    intermediate layers using linear classifier probes", 2016.
    """

    logs = ("accuracy_probe/{dataset_key}",)
    # The ranks of a run share the batches; each then has the rows of all samples, in their order.
    shares_work = True

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        images, targets = batch
        self.gathered.add_rows("codes", self.trainer.predict(images)["latent"]["mean"])
        self.gathered.add_rows("targets", targets)

    def _process_results(self, update_counter: UpdateCounter) -> None:
        codes, targets = self.gathered.rows["codes"].double(), self.gathered.rows["targets"]
        codes = torch.cat([codes, torch.ones_like(codes[:, :1])], dim=1)  # with a bias
        wanted = nn.functional.one_hot(targets).double()
        weights = torch.linalg.lstsq(codes[::2], wanted[::2]).solution
        hits = (codes[1::2] @ weights).argmax(1) == targets[1::2]
        self.writer.add_scalar(f"accuracy_probe/{self.dataset_key}", hits.double().mean())
        rows = [[digit, hits[targets[1::2] == digit].double().mean()] for digit in range(wanted.shape[1])]
        self.writer.add_table("probe", ["digit", "accuracy"], rows)
