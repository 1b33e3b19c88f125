"""Writes and reads TensorBoard's event files, with TensorBoard's own messages; imports neither torch nor TensorFlow."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ksuit_runner.record.point import LoggedFile, Point, now
from ksuit_runner.system.atomic_files import sync
from ksuit_runner.system.untrusted_files import open_to_read
from ksuit_runner.tracker.plain_value import plain_value

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

TEXT_PREFIX = "ksuit/"
"""How the tags of texts begin; a tag cannot hold both texts and numbers."""

HPARAMS_PREFIX = "_hparams_/"
"""How the tags of TensorBoard's table of hyperparameters begin."""

_NAME = "events.out.tfevents."  # TensorBoard reads the files whose names contain its second part, in their order
_LONGEST_RECORD = 1 << 26  # in bytes
_MAY_BE_TORN = 1 << 20  # bytes at the end whose checksums are computed, in Python: what comes before them was synced
_SCALARS, _TEXT, _HPARAMS, _IMAGES, _HISTOGRAMS = "scalars", "text", "hparams", "images", "histograms"  # its plugins
_MOST_ROWS = 100  # of a table that is shown as text


class EventFile:
    """A new event file in a folder. Nothing is appended to older ones: a killed process may have torn their ends.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        path = folder / f"{_NAME}{time.time_ns()}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._described: set[str] = set()  # tags whose plugin is named in this file
        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])
        sync(folder)

    def add_points(self, points: Sequence[Point]) -> None:
        """Write metric points, and wait until they are on the disk.

        TensorBoard's default reader takes floats only. The exact value stands beside that, where no reader looks.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_FLOAT

        events = []
        for (step, timestamp), group in groupby(points, key=lambda point: (point.step, point.timestamp)):
            values = [
                Summary.Value(
                    tag=point.key,
                    metadata=self._metadata(point.key, _SCALARS),
                    tensor=TensorProto(
                        dtype=DT_FLOAT,
                        tensor_shape=TensorShapeProto(),
                        float_val=[point.value],
                        double_val=[point.value],
                    ),
                )
                for point in group
            ]
            events.append(_event(step, timestamp, values))
        self._write(events)

    def add_files(self, files: Sequence[tuple[LoggedFile, bytes]]) -> None:
        """Write logged files with their contents: images and histograms as such, all others as text."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        events = []
        for file, content in files:
            try:
                plugin, tensor = _shown(file.kind, content)
            except (ValueError, TypeError, LookupError, struct.error):
                continue  # it was changed since
            value = Summary.Value(tag=file.key, metadata=self._metadata(file.key, plugin), tensor=tensor)
            events.append(_event(file.step, file.timestamp, [value]))
        self._write(events)

    def add_table(self, name: str, rows: Mapping[str, str], step: int) -> None:
        """Write a table of names and values, which TensorBoard shows as text."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        lines = ["| | |", "|-|-|", *(f"| `{_cell(key)}` | `{_cell(value)}` |" for key, value in rows.items())]
        tag = TEXT_PREFIX + name
        text = _strings("\n".join(lines).encode())
        self._write([_event(step, now(), [Summary.Value(tag=tag, metadata=self._metadata(tag, _TEXT), tensor=text)])])

    def add_hparams(self, name: str, params: Mapping[str, str], start_time: int) -> None:
        """Write parameters for TensorBoard's table of hyperparameters; numbers and truth values as such.

        Args:
            name: Name of the run.
            params: The parameters.
            start_time: When the run was started, in ms since 1970.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

        start = SessionStartInfo(group_name=name, start_time_secs=start_time / 1000)
        for key, value in params.items():
            _set_hparam(start.hparams[key], value)
        tag = f"{HPARAMS_PREFIX}session_start_info"
        content = HParamsPluginData(version=0, session_start_info=start).SerializeToString()
        value = Summary.Value(tag=tag, metadata=self._metadata(tag, _HPARAMS, content), tensor=_empty_tensor())
        self._write([_event(0, start_time, [value])])

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _metadata(self, tag: str, plugin: str, content: bytes = b"") -> Any:
        from tensorboard.compat.proto import summary_pb2

        if tag in self._described:
            return None
        self._described.add(tag)
        data = summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin, content=content)
        kinds = {_SCALARS: summary_pb2.DATA_CLASS_SCALAR, _IMAGES: summary_pb2.DATA_CLASS_BLOB_SEQUENCE}
        kind = kinds.get(plugin, summary_pb2.DATA_CLASS_TENSOR)
        return summary_pb2.SummaryMetadata(plugin_data=data, data_class=kind)

    def _write(self, events: Iterable[Event]) -> None:
        content = b"".join(_record(event.SerializeToString()) for event in events)
        if os.write(self._file, content) != len(content):
            raise OSError(f"only a part of {len(content):,} bytes could be written")
        os.fsync(self._file)


def import_messages() -> None:
    """Import TensorBoard's messages ahead of their use."""
    import tensorboard.compat.proto.event_pb2
    import tensorboard.compat.tensorflow_stub.pywrap_tensorflow
    import tensorboard.plugins.hparams.plugin_data_pb2  # noqa: F401


def read_points(folder: Path) -> Iterator[Point]:
    """Yield the metric points in the event files of a folder, in the order in which they were written.

    A file is read up to its first damaged record: a killed process leaves the last one torn.
    """
    for event, value in _values(folder):
        for exact in value.tensor.double_val:
            yield Point(value.tag, exact, event.step, round(event.wall_time * 1000))


def read_files(folder: Path) -> Iterator[LoggedFile]:
    """Yield the logged files in the event files of a folder, without their paths, as ``read_points`` yields points."""
    for event, value in _values(folder):
        if not value.tensor.double_val:
            yield LoggedFile(value.tag, "", event.step, round(event.wall_time * 1000))


def _values(folder: Path) -> Iterator[tuple[Event, Any]]:
    for path in sorted(folder.glob(f"{_NAME}*")):
        with open_to_read(path) as file:
            for event in _events(file):
                yield from ((event, value) for value in event.summary.value)


def _events(file: BinaryIO) -> Iterator[Event]:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    position, checked_from = 0, os.fstat(file.fileno()).st_size - _MAY_BE_TORN
    while len(head := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", head[:8])
        if length > _LONGEST_RECORD:
            return
        content, checksum = file.read(length), file.read(4)
        position += len(head) + length + len(checksum)
        if len(checksum) < 4 or (position > checked_from and head + content + checksum != _record(content)):
            return
        try:
            yield Event.FromString(content)
        except DecodeError:
            return


def _record(content: bytes) -> bytes:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    head = struct.pack("<Q", len(content))
    return b"".join((head, struct.pack("<I", masked_crc32c(head)), content, struct.pack("<I", masked_crc32c(content))))


def _event(step: int, timestamp: int, values: Sequence[Any]) -> Event:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(wall_time=timestamp / 1000, step=step, summary=Summary(value=values))


def _empty_tensor() -> Any:
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_FLOAT

    return TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))


def _strings(*values: bytes) -> Any:
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(values))])
    return TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=values)


def _shown(kind: str, content: bytes) -> tuple[str, Any]:
    """Return the plugin that shows a logged file, and the tensor that it shows."""
    if kind == "images":
        return _IMAGES, _image(content)
    if kind == "histograms":
        return _HISTOGRAMS, _histogram(content)
    return _TEXT, _strings(_as_text(kind, content))


def _image(content: bytes) -> Any:
    """Return a PNG as TensorBoard has images: width, height, content."""
    width, height = struct.unpack(">II", content[16:24])
    return _strings(str(width).encode(), str(height).encode(), content)


def _histogram(content: bytes) -> Any:
    """Return the bins of a histogram as TensorBoard has them: rows of both ends and the count."""
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_DOUBLE

    rows = [row for row in json.loads(content)["data"] if row[0] is not None]
    numbers = [float(number) for row in rows for number in row]
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(rows)), TensorShapeProto.Dim(size=3)])
    return TensorProto(dtype=DT_DOUBLE, tensor_shape=shape, tensor_content=struct.pack(f"<{len(numbers)}d", *numbers))


def _as_text(kind: str, content: bytes) -> bytes:
    if kind == "tables":
        table = json.loads(content)
        head = [table["columns"], ["-"] * len(table["columns"])]
        lines = ["|".join(("", *(_cell(str(cell)) for cell in row), "")) for row in head + table["data"][:_MOST_ROWS]]
        return "\n".join(lines).encode()
    return content if kind == "texts" else f"{len(content):,} bytes".encode()


def _set_hparam(target: Any, text: str) -> None:
    value = plain_value(text)
    if isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int | float):
        target.number_value = value
    else:
        target.string_value = value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
