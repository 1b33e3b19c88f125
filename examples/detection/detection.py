"""Detection: images of different sizes with any number of boxes, in batches that are lists."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from torch.utils.data import Dataset

from ksuit_runner import SgdTrainer

Sample = dict[str, Any]


class Squares(Dataset[Sample]):
    """Noisy images of 16 to 24 pixels with one to three bright squares, which are to be found.

    A sample is a mapping: ``image``, float32 of shape (1, height, width); ``boxes``, float32 of shape (boxes, 4) with
    left, top, right and bottom in pixels; ``name``, a text. Images and noise are drawn anew whenever they are fetched.

    Args:
        size: Number of images.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        height, width = torch.randint(16, 25, (2,)).tolist()
        image, boxes = 0.1 * torch.randn(1, height, width), []
        for _ in range(int(torch.randint(1, 4, ()))):
            side = int(torch.randint(4, 8, ()))
            left, top = int(torch.randint(0, width - side, ())), int(torch.randint(0, height - side, ()))
            image[:, top : top + side, left : left + side] += 1.0
            boxes.append([left, top, left + side, top + side])
        return {"image": image, "boxes": torch.tensor(boxes, dtype=torch.float32), "name": f"image {index}"}


def as_lists(samples: list[Sample]) -> dict[str, list[Any]]:
    """Collate a batch without stacking: lists with an entry per image."""
    return {key: [sample[key] for sample in samples] for key in samples[0]}


class Detector(nn.Module):
    """Predicts for every second pixel whether it is in a square, and the distances to the four sides of that square.

    After FCOS (Tian et al., ICCV 2019, arXiv:1904.01355).

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(width, width, 5, padding=2)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, 5, 1))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        """Return for each image a tensor of shape (5, rows, columns): a score, and four distances in pixels."""
        return [self.layers(image.unsqueeze(0)).squeeze(0) for image in images]


class DetectionTrainer(SgdTrainer):
    """Has a loss of two parts, each a mean over something else than images."""

    def training_step(self, batch: dict[str, list[Any]], model: nn.Module) -> tuple[dict[str, Any], list[Tensor]]:
        """Compute the losses of some images.

        Returns:
            ``score``, the mean over the points of all images, and ``box``, the mean over those in a square, each with
            the number of points that it is a mean over; and what the model returns.
        """
        outputs = model(batch["image"])
        scores, insides, errors = [], [], []
        for output, boxes in zip(outputs, batch["boxes"], strict=True):
            inside, distances = targets_of(boxes, *output.shape[1:])
            scores.append(output[0].flatten())
            insides.append(inside.flatten())
            errors.append(smooth_l1_loss(output[1:, inside], distances[:, inside], reduction="none").flatten())
        inside, error = torch.cat(insides), torch.cat(errors)
        score = nn.functional.binary_cross_entropy_with_logits(torch.cat(scores), inside.float())
        return {"score": (score, inside.numel()), "box": (error.mean(), error.numel())}, outputs


def targets_of(boxes: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return which points are in a box, shape (rows, columns), and their distances to its sides, (4, rows, columns)."""
    top, left = torch.meshgrid(torch.arange(rows) * 2.0, torch.arange(columns) * 2.0, indexing="ij")
    points = torch.stack([left, top, left, top]).to(boxes.device)
    sides = boxes[:, :, None, None]
    distances = torch.cat([points[:2] - sides[:, :2], sides[:, 2:] - points[2:]], 1)  # (boxes, 4, rows, columns)
    is_in = (distances > 0).all(1)
    # A point in several boxes belongs to the last of them.
    last = (is_in * torch.arange(1, len(boxes) + 1, device=boxes.device)[:, None, None]).argmax(0)
    return is_in.any(0), distances.gather(0, last[None, None].expand(1, 4, -1, -1)).squeeze(0)
