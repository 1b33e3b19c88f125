"""What can be told about a dataset from a few of its samples, without disturbing any random generator."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from ksuit_runner.data.fetch import EVALUATION, Fetch, fetch
from ksuit_runner.random_keys import keyed

_SAMPLES = 8


def dataset_digest(datasets: Mapping[str, Any], dataset_key: str) -> str:
    """Hash a dataset's class, length and a few samples, spread from the first to the last.

    Returns:
        16 hexadecimal digits.
    """
    dataset = datasets[dataset_key]
    digest = blake2b(digest_size=8)
    digest.update(repr((type(dataset).__module__, type(dataset).__qualname__, len(dataset))).encode())
    with keyed("sample"):
        for index in np.unique(np.linspace(0, len(dataset) - 1, _SAMPLES).astype(np.int64)).tolist():
            _add(digest, _sample(datasets, dataset_key, index))
    return digest.hexdigest()


def first_shape(datasets: Mapping[str, Any], dataset_key: str) -> tuple[int, ...] | None:
    """Return the shape of the first element of a dataset's first sample; None if it has none."""
    with keyed("sample"):
        value = _sample(datasets, dataset_key, 0)
    while isinstance(value, (Mapping, list, tuple)) and value:
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return tuple(value.shape[1:]) if hasattr(value, "shape") else None


def _sample(datasets: Mapping[str, Any], dataset_key: str, index: int) -> Any:
    """Fetch a batch of one, the same for every seed of a run."""
    return fetch(datasets, 0, Fetch(dataset_key, EVALUATION, index, np.array([index])))


def _add(digest: blake2b, value: Any) -> None:
    """Add a value to a digest; of objects that are not data, only the class."""
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        digest.update(repr((str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest.update(repr((value.dtype.str, value.shape)).encode())
        digest.update(value.tobytes())
    elif isinstance(value, Mapping):
        _add(digest, list(value.items()))
    elif isinstance(value, (list, tuple)):
        digest.update(repr(len(value)).encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, (str, bytes, bool, int, float, complex, np.generic)) or value is None:
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
