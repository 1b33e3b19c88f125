"""Self-distillation without labels, with the teacher as a part of the trainer's state.

M. Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv:2104.14294; here with a
small network, and two views of an image.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ksuit_runner import DatasetCallback, SgdTrainer, UpdateCounter


class Student(nn.Module):
    """A backbone, whose features are what is wanted, and a head for training.

    Args:
        input_shape: (channels, height, width) of the images; filled in from the data.
        dim: Width of the features.
        prototypes: Number of outputs of the head.
    """

    def __init__(self, input_shape: tuple[int, ...], dim: int, prototypes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(input_shape[0], dim // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * dim, dim),
        )
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, prototypes))

    def forward(self, images: Tensor) -> Tensor:
        """Return scores of (images, prototypes)."""
        return self.head(self.backbone(images))


class Distillation(nn.Module):
    """Cross-entropy between the distribution of the teacher, centred and sharpened, and that of the student.

    Args:
        student_temperature: Temperature of the student's distribution.
        teacher_temperature: Temperature of the teacher's distribution.
    """

    def __init__(self, student_temperature: float, teacher_temperature: float) -> None:
        super().__init__()
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature

    def forward(self, student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        """Return the mean over the images, from scores of (images, prototypes) and a center of (prototypes,)."""
        wanted = ((teacher - center) / self.teacher_temperature).softmax(1)
        return -(wanted * (student / self.student_temperature).log_softmax(1)).sum(1).mean()


class DinoTrainer(SgdTrainer):
    """Trains the student to predict, from one view of an image, what the teacher says about another.

    Args:
        momentum: Share of the old weights in the teacher after an update.
        center_momentum: Share of the old center after an update.
        **kwargs: Passed on to SgdTrainer.
    """

    offers = ("teacher",)

    def __init__(self, momentum: float, center_momentum: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.momentum, self.center_momentum = momentum, center_momentum
        self.teacher = deepcopy(self.model.module).requires_grad_(False)
        self.center = torch.zeros(self.teacher.head[-1].out_features, device=self.device)
        self._means: list[Tensor] = []  # of the teacher's scores, for each part of the batch
        self.add_evaluation_model("teacher", self.teacher)  # evaluations report it beside the student

    def training_step(self, batch: Any, model: nn.Module) -> tuple[Tensor, Any]:
        """Return the loss, symmetric in both views, and the student's scores of the first view."""
        images, _ = batch
        first, second = augmented(images), augmented(images)
        with torch.no_grad():
            of_first, of_second = self.teacher(first), self.teacher(second)
        scores = model(first)
        loss = self.loss(scores, of_second, self.center) + self.loss(model(second), of_first, self.center)
        if model.training:  # an evaluation changes nothing
            self._means.append(torch.cat([of_first, of_second]).mean(0))
        return loss / 2, scores

    def start_update(self, *args: Any) -> Any:
        """Begin with the first part of another batch."""
        self._means.clear()
        return super().start_update(*args)

    def step(self, *args: Any) -> None:
        """Update the student, and let the teacher and the center follow it."""
        super().step(*args)
        # Each rank has those of its own parts. All of them, in the order of the parts, are the same on any number.
        means = [mean for each in self.strategy.world.gather_tensors(self._means) for mean in each]
        self.center = self.center.lerp(torch.stack(means).mean(0).to(self.device), 1 - self.center_momentum)
        with torch.no_grad():
            for mean, weight in zip(self.teacher.parameters(), self.model.module.parameters(), strict=True):
                mean.lerp_(weight, 1 - self.momentum)

    def extra_state(self) -> dict[str, Any]:
        """Return what checkpoints hold of it, and what a failed or skipped update gets back."""
        return {"teacher": dict(self.teacher.state_dict()), "center": self.center}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.teacher.load_state_dict(state["teacher"])
        self.center = state["center"].to(self.device)


def augmented(images: Tensor) -> Tensor:
    """Return views of (images, channels, height, width): shifted by up to a pixel, brighter or darker, and noisy."""
    padded = functional.pad(images, (1, 1, 1, 1))
    top, left = torch.randint(3, (2,)).tolist()
    shifted = padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]
    gain = torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(0.7, 1.3)
    return shifted * gain + 0.1 * torch.randn_like(images)


class NearestNeighbor(DatasetCallback):
    """Logs ``accuracy_nearest/DATASET``: whether the image with the most similar features is of the same class."""

    logs = ("accuracy_nearest/{dataset_key}{/weights}",)
    # The ranks of a run share the batches; each then has the rows of all samples, in their order.
    shares_work = True

    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        images, targets = batch
        self.gathered.add_rows("targets", targets)
        for name, model in models.items():
            backbone = getattr(model, "module", model).backbone  # the live model is wrapped
            self.gathered.add_rows(("features", name), functional.normalize(backbone(images)))

    def _process_results(self, update_counter: UpdateCounter) -> None:
        rows = dict(self.gathered.rows)
        targets = rows.pop("targets")
        for (_, name), features in rows.items():
            nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)
            hits = targets[nearest] == targets
            self.writer.add_scalar(self.metric_key("accuracy_nearest", name), hits.double().mean())
