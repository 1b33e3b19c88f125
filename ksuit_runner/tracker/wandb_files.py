"""Reads what is logged in W&B's own files: what is in them is recorded, whatever happens to W&B's process."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ksuit_runner.record.point import LoggedFile, Point
from ksuit_runner.system.untrusted_files import open_to_read

STEP = "update"
"""Name under which W&B has the update of a point, the x-axis of all metrics: its own steps must never go back."""

TIMESTAMP = "_timestamp"
"""Name under which W&B has the time of a point, in s since 1970."""

_HEADER, _BLOCK = 7, 1 << 15  # the file is a log of LevelDB: blocks that hold records, or parts of such
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class RecordReader:
    """Reads one file while it grows, or what a killed process has left of it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = _HEADER

    def read(self) -> Iterator[Any]:
        """Yield the messages of all whole records that were not read yet."""
        from google.protobuf.message import DecodeError
        from wandb.proto.wandb_internal_pb2 import Record

        parts, position = b"", self._position
        with open_to_read(self._path) as file:
            file.seek(position)
            while True:
                if (left := _BLOCK - position % _BLOCK) < _HEADER:
                    position += left
                    file.seek(position)
                head = file.read(_HEADER)
                if len(head) < _HEADER:
                    return
                _, length, kind = struct.unpack("<IHB", head)
                content = file.read(length)
                if len(content) < length or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
                    return  # not written yet, or torn
                parts += content
                position += _HEADER + length
                if kind in (_FULL, _LAST):
                    try:
                        record = Record.FromString(parts)
                    except DecodeError:
                        return
                    parts, self._position = b"", position
                    yield record


def read_logged(folder: Path) -> Iterator[Point | LoggedFile]:
    """Yield what is logged in the files below W&B's folder of a run, in the order in which it was written."""
    for path in sorted(folder.glob("*/*.wandb")):
        for record in RecordReader(path).read():
            yield from logged_in(record)


def read_points(folder: Path) -> Iterator[Point]:
    """Yield only the metric points of ``read_logged``."""
    return (item for item in read_logged(folder) if isinstance(item, Point))


def logged_in(record: Any) -> Iterator[Point | LoggedFile]:
    """Yield the metric points in a message, and the images and the like, without their paths."""
    if record.WhichOneof("record_type") != "history":
        return
    # An image or the like is an object, whose entries have keys of two parts.
    files = {item.nested_key[0] for item in record.history.item if len(item.nested_key) > 1}
    try:
        items = [item for item in record.history.item if len(item.nested_key) <= 1]
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
        step, timestamp = int(row.pop(STEP)), round(row.pop(TIMESTAMP) * 1000)
        values = {key: float(value) for key, value in row.items() if not key.startswith("_")}
    except (ValueError, TypeError, LookupError, OverflowError):
        return  # not a row of this tracker
    yield from (Point(key, value, step, timestamp) for key, value in values.items())
    yield from (LoggedFile(key, "", step, timestamp) for key in sorted(files))
