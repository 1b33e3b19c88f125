"""Inputs of a model as pictures."""

import torch
from torch import Tensor

from ksuit_runner.errors import ConfigError

_PADDING = 2  # pixels between the pictures of a grid
_CHANNELS = (1, 3, 4)


def as_pictures(inputs: object, path: str) -> Tensor:
    """Return pictures with values from 0 to 1, as float32 of shape (samples, channels, height, width), on the CPU.

    Values outside of this range, as normalization makes them, are scaled together, from the smallest to the largest.

    Args:
        inputs: Tensor of shape (samples, channels, height, width) with 1, 3 or 4 channels, or (samples, height, width);
            integers are from 0 to 255.
        path: Config path of who wants them, for messages.

    Raises:
        ConfigError: They are no pictures.
    """
    shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else ()
    if not isinstance(inputs, Tensor) or not (len(shape) == 3 or (len(shape) == 4 and shape[1] in _CHANNELS)):
        found = f"a tensor of shape {shape}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ConfigError(
            f"the inputs are no pictures, of shape (samples, height, width) or (samples, 1, 3 or 4 channels, height, "
            f"width), but {found}",
            path=path,
        )
    pictures = inputs.detach().cpu()
    pictures = pictures.float() / (1 if pictures.is_floating_point() or pictures.dtype == torch.bool else 255)
    pictures = pictures.unsqueeze(1) if pictures.ndim == 3 else pictures
    low, high = pictures.aminmax()
    return pictures if low >= 0 and high <= 1 else (pictures - low) / (high - low).clamp(min=1e-12)


def grid(pictures: Tensor, columns: int) -> Tensor:
    """Lay out pictures in rows, from left to right.

    Args:
        pictures: Of shape (pictures, channels, height, width), from 0 to 1.
        columns: Number of pictures of a row.

    Returns:
        One picture of shape (channels, height, width), with narrow white lines between them.
    """
    rows = []
    for row in pictures.split(columns):  # type: ignore[no-untyped-call]
        missing = torch.ones(columns - len(row), *row.shape[1:])
        padded = torch.nn.functional.pad(torch.cat([row, missing]), (0, _PADDING, 0, _PADDING), value=1.0)
        rows.append(torch.cat(list(padded), dim=2))
    return torch.cat(rows, dim=1)[:, :-_PADDING, :-_PADDING]
