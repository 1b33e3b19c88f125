"""The files that images, tables and the like are stored in, below the artifact root of a run, with the step in them.

The same content at the same step gives the same names and the same bytes: an update that is computed again after a
resume writes what is there already. Images are laid out as MLflow's page expects its charts of images; tables are those
of MLflow's viewer.
"""

import io
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np

from ksuit_runner.errors import KsuitError, named_type
from ksuit_runner.ui.figure_text import save_figure

Contents = dict[str, bytes]
"""Files by their paths below the artifact root, the main one first."""

_KEY = re.compile(r"[\w-][\w. -]*(/[\w-][\w. -]*)*", re.ASCII)
_SUFFIX = re.compile(r"\.\w{1,16}", re.ASCII)
_LONGEST_KEY = 100  # characters; it becomes a part of a file's name
_PADDING = 2  # pixels between the images of a grid
_THUMBNAIL = 256  # pixels, as MLflow's own
_CHANNELS = (1, 3, 4)


def image_files(key: str, step: int, image: Any) -> Contents:
    """Return an image as PNG, with a thumbnail.

    Args:
        key: Its name.
        step: The update.
        image: Of shape (height, width), (channels, height, width) or (height, width, channels) with 1, 3 or 4 channels,
            or (images, channels, height, width) for a grid. Integers are from 0 to 255, others from 0 to 1, or cut to
            that. Or an image of Pillow.
    """
    module = _package("PIL.Image", "pillow", "an image")
    if not isinstance(image, module.Image):
        image = module.fromarray(_pixels(key, np.asarray(image)))
    small = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    # MLflow's names have the time and a random id in the places of the second step and of this one.
    name = (
        f"images/{_checked(key).replace('/', '~')}+step+{step}+timestamp+{step}+{uuid5(NAMESPACE_OID, f'{key} {step}')}"
    )
    return {f"{name}.png": _saved(image, "png"), f"{name}+compressed.webp": _saved(small, "webp")}


def figure_files(key: str, step: int, figure: Any) -> Contents:
    """Return a figure of Matplotlib, as an image."""
    if not callable(getattr(figure, "savefig", None)):
        raise KsuitError(f"'{key}' has to be a figure of Matplotlib, not {named_type(figure)}")
    module = _package("PIL.Image", "pillow", "a figure")
    buffer = io.BytesIO()
    save_figure(figure, buffer, format="png", metadata={"Software": None})
    return image_files(key, step, module.open(buffer).convert("RGB"))


def histogram_files(key: str, step: int, values: Any, bins: int) -> Contents:
    """Return a histogram: a table of its bins, and of how many values are in none of them because they are not finite.

    Args:
        key: Its name.
        step: The update.
        values: Numbers, of any shape.
        bins: Number of bins of the same width.
    """
    if bins < 1:
        raise KsuitError(f"'{key}': a histogram has at least one bin, not {bins}")
    if np.iscomplexobj(values):
        raise KsuitError(f"'{key}': a histogram is one of real numbers, not of complex ones")
    numbers = np.asarray(values, dtype=np.float64).ravel()
    finite = numbers[np.isfinite(numbers)]
    rows: list[Sequence[Any]] = []
    if finite.size:
        try:
            with np.errstate(over="raise", invalid="raise"):
                counts, edges = np.histogram(finite, bins)
        except (ValueError, FloatingPointError):  # they are too close together for so many bins, or too far apart
            counts, edges = np.array([finite.size]), np.array([finite.min(), finite.max()])
        rows = list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))
    if finite.size < numbers.size:
        rows.append((None, None, numbers.size - finite.size))
    return _json("histograms", key, step, ("from", "to", "count"), rows)


def table_files(key: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Contents:
    """Return a table as JSON: ``{"columns": [...], "data": [[...], ...]}``; what JSON lacks is text."""
    if any(len(row) != len(columns) for row in rows):
        raise KsuitError(f"'{key}': a row of the table has not one value for each of its {len(columns)} columns")
    return _json("tables", key, step, columns, rows)


def text_files(key: str, step: int, text: str) -> Contents:
    """Return a text; what UTF-8 lacks is escaped."""
    if not isinstance(text, str):
        raise KsuitError(f"'{key}' has to be a text, not {named_type(text)}")
    return {_path("texts", key, step, ".txt"): text.encode(errors="backslashreplace")}


def copied_file(key: str, step: int, path: Path) -> Contents:
    """Return the content of a file as it is now; its name keeps the suffix, if that is a usual one."""
    suffix = path.suffix if _SUFFIX.fullmatch(path.suffix) else ""
    return {_path("files", key, step, suffix): path.read_bytes()}


def _json(kind: str, key: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Contents:
    data = [[_plain(value) for value in row] for row in rows]
    text = json.dumps({"columns": [str(column) for column in columns], "data": data}, allow_nan=False)
    return {_path(kind, key, step, ".json"): text.encode()}


def _plain(value: Any) -> Any:
    if callable(getattr(value, "item", None)):
        with suppress(ValueError, RuntimeError):  # it has several elements
            value = value.item()
    is_plain = (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    )
    return value if is_plain else str(value)


def _path(kind: str, key: str, step: int, suffix: str) -> str:
    return f"{kind}/{_checked(key)}/{step:08}{suffix}"


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or len(key) > _LONGEST_KEY:
        raise KsuitError(
            f"'{key[:_LONGEST_KEY]}' is to name a file: it needs letters, digits, '_', '-', '.' and ' ', in parts "
            f"separated by '/' that do not begin with '.', and at most {_LONGEST_KEY} characters"
        )
    return key


def _pixels(key: str, image: Any) -> Any:
    """Return pixels of shape (height, width) or (height, width, channels), as bytes."""
    if not image.size or np.iscomplexobj(image):
        raise _not_an_image(key, image)
    if image.ndim == 4:
        image = _grid(np.stack([_channels_last(key, item) for item in image]))
    elif image.ndim == 3:
        image = _channels_last(key, image)
    elif image.ndim != 2:
        raise _not_an_image(key, image)
    if not np.issubdtype(image.dtype, np.integer):
        image = np.rint(np.nan_to_num(image.astype(np.float32)).clip(0, 1) * 255)
    image = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
    return image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image


def _channels_last(key: str, image: Any) -> Any:
    if image.ndim == 3 and image.shape[0] in _CHANNELS:
        return image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] not in _CHANNELS:
        raise _not_an_image(key, image)
    return image


def _grid(images: Any) -> Any:
    """Lay images out in rows, about as many as there are columns."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = rows * (height + _PADDING) - _PADDING, columns * (width + _PADDING) - _PADDING, channels
    grid = np.zeros(shape, images.dtype)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = row * (height + _PADDING), column * (width + _PADDING)
        grid[top : top + height, left : left + width] = image
    return grid


def _not_an_image(key: str, image: Any) -> KsuitError:
    return KsuitError(
        f"'{key}' has to be an image, with 1, 3 or 4 channels first or last, or a batch of such, not an array of shape "
        f"{tuple(image.shape)} with values of type {image.dtype}"
    )


def _saved(image: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _package(module: str, package: str, what: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise KsuitError(f"{what} is stored by {package}, which is not installed: pip install {package}") from error
