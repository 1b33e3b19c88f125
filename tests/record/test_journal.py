import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksuit_runner.record.journal import Journal, JournalReader, is_damaged, read_points
from ksuit_runner.record.point import Point
from ksuit_runner.system.atomic_files import renew, write_bytes


def _points(journal: Journal, offset: int = 0) -> list[Point]:
    return [point for points, _ in journal.read(offset) for point in points]


def test_reads_back_what_was_appended(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    journal.append(1, {"loss/train": 0.1, "lr": 1e-3})
    journal.append(2, {"loss/train": math.inf, "lr": -math.inf})
    found = [point[:3] for point in _points(journal)]
    assert found == [("loss/train", 0.1, 1), ("lr", 1e-3, 1), ("loss/train", math.inf, 2), ("lr", -math.inf, 2)]
    assert journal.size == journal.path.stat().st_size


def test_nan_and_given_timestamp(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(3, {"a": math.nan}, timestamp=1234)
    (point,) = _points(journal)
    assert math.isnan(point.value)
    assert point.timestamp == 1234


_TEXT = st.text(st.characters(), max_size=8)  # with halves of surrogate pairs


@given(st.lists(st.dictionaries(_TEXT, st.floats(allow_nan=False), min_size=1, max_size=3), max_size=5))
def test_any_text_and_any_float_survive_exactly(tmp_path_factory, flushes) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path)
    for step, metrics in enumerate(flushes):
        journal.append(step, metrics)
    journal.close()
    again = Journal(path)
    written = [(key, value, step) for step, metrics in enumerate(flushes) for key, value in metrics.items()]
    assert [point[:3] for point in _points(again)] == written
    again.close()


def test_no_metrics_write_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(1, {})
    assert journal.size == 0


def test_every_line_is_json_for_other_readers(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(1, {"a": 0.5}, timestamp=7)
    entry = json.loads(journal.path.read_text())
    assert {key: entry[key] for key in "stm"} == {"s": 1, "t": 7, "m": {"a": 0.5}}


def test_reads_on_from_an_offset(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(1, {"a": 1})
    offset = journal.size
    journal.append(2, {"a": 2})
    assert [point.step for point in _points(journal, offset)] == [2]
    assert list(journal.read())[-1][1] == journal.size


@pytest.mark.parametrize("kept", range(0, 50, 7))
def test_torn_tail_is_dropped_at_any_length(tmp_path: Path, caplog, kept: int) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append(1, {"a": 1.0}, timestamp=1)
    good = journal.size
    journal.append(2, {"a": 2.0, "b": 3.0}, timestamp=2)
    assert good + kept < journal.size
    journal.close()
    os.truncate(path, good + kept)
    with caplog.at_level(logging.WARNING):
        again = Journal(path)
    assert _points(again) == [Point("a", 1.0, 1, 1)]
    assert path.stat().st_size == again.size == good
    assert not caplog.records  # a killed process is nothing to worry about
    again.append(2, {"a": 2.5}, timestamp=3)
    assert [point.value for point in _points(again)] == [1.0, 2.5]


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_flipped_bit_costs_at_most_its_line(tmp_path: Path, caplog, line: int) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    bounds = [0]
    for step in (1, 2, 3):
        journal.append(step, {"a": step / 7, "c": 0.5}, timestamp=step)
        bounds.append(journal.size)
    journal.close()
    content = path.read_bytes()
    for place in range(bounds[line], bounds[line + 1]):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        caplog.clear()
        again = Journal(path)
        is_end = place == bounds[line + 1] - 1  # the end of a line holds nothing
        kept = [step for step in (1, 2, 3) if step != line + 1 or is_end]
        assert [point.step for point in _points(again)[::2]] == kept
        assert again.damaged == 1
        assert f"damaged lines: 1, the first at byte {bounds[line]}" in caplog.text
        again.append(4, {"a": 4.0}, timestamp=4)
        assert _points(again)[-1] == Point("a", 4.0, 4, 4)
        again.close()


@pytest.mark.parametrize(
    "entry",
    [
        {"s": "1", "t": 1, "m": {"a": 1.0}},
        {"s": 1, "t": 2**63, "m": {"a": 1.0}},
        {"s": True, "t": 1, "m": {"a": 1.0}},
        {"s": 1, "t": 1, "m": {"a": "1.0"}},
        {"s": 1, "t": 1, "m": {"a": 10**400}},
        {"s": 1, "t": 1, "m": [["a", 1.0]]},
        {"s": 1, "t": 1},
    ],
)
def test_a_line_with_the_right_checksum_may_make_no_sense(tmp_path: Path, entry) -> None:
    payload = json.dumps(entry).encode()[1:]
    (tmp_path / "j").write_bytes(b'{"c":"%08x",%s\n' % (crc32(payload), payload))
    journal = Journal(tmp_path / "j")
    assert (_points(journal), journal.damaged) == ([], 1)


def test_the_largest_integers_of_64_bits_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(2**63 - 1, {"a": 1.0}, timestamp=1 - 2**63)
    assert _points(journal) == [Point("a", 1.0, 2**63 - 1, 1 - 2**63)]


def test_load_after_finds_what_was_logged_past_the_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for step in (1, 2, 3):
        journal.append(step, {"loss": step / 10}, timestamp=step)
    journal.append(3, {"accuracy": 0.5}, timestamp=9)
    assert journal.load_after(1) == {
        2: {"loss": Point("loss", 0.2, 2, 2)},
        3: {"loss": Point("loss", 0.3, 3, 3), "accuracy": Point("accuracy", 0.5, 3, 9)},
    }
    assert journal.load_after(3) == {}


def test_fork_copies_the_past_with_its_timestamps(tmp_path: Path) -> None:
    parent = Journal(tmp_path / "parent")
    for step in (1, 2, 3):
        parent.append(step, {"loss": step / 10}, timestamp=step)
    with parent.path.open("ab") as file:
        file.write(b'{"torn')  # the parent may be writing right now
    size = parent.path.stat().st_size
    fork = Journal(tmp_path / "fork")
    fork.copy_until(parent.path, 2)
    assert _points(fork) == _points(parent)[:2]
    assert parent.path.stat().st_size == size


def test_boundaries(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(1, {"a": 1})
    assert journal.is_boundary(0)
    assert journal.is_boundary(journal.size)
    assert not journal.is_boundary(journal.size - 1)
    assert not journal.is_boundary(journal.size + 1)


_WRITER = """
import itertools, sys
from pathlib import Path
from ksuit_runner.record.journal import Journal
journal = Journal(Path(sys.argv[1]))
for step in itertools.count(1):
    journal.append(step, {f"key{i}": step + i / 7 for i in range(50)}, timestamp=step)
    if step == 50:
        print("go", flush=True)
"""


def test_a_killed_writer_leaves_a_journal_without_gaps(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for _ in range(3):  # also over what the last one left
        path.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"go\n"
            writer.send_signal(signal.SIGKILL)
        journal = Journal(path)
        lines = [points for points, _ in journal.read()]
        assert len(lines) >= 50
        for step, points in enumerate(lines, start=1):
            assert points == [Point(f"key{i}", step + i / 7, step, step) for i in range(50)]
        journal.append(0, {"a": 1}, timestamp=7)
        assert _points(journal)[-1] == Point("a", 1, 0, 7)
        journal.close()


def test_what_waits_for_room_is_written_in_its_order_and_said_once(tmp_path: Path, monkeypatch, caplog) -> None:
    journal, write = Journal(tmp_path / "j"), os.write
    journal.append(1, {"a": 1.0})
    for room in (0, 7, 0):  # a part of a line is taken back
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, line, room=room: _take(write, file, line, room))
            journal.append(2, {"a": 2.0}, 5)
            with pytest.raises(OSError, match="No space left"):
                journal.sync()
        assert (tmp_path / "j").stat().st_size == journal.size
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    journal.append(9, {"a": 3.0})
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    journal.append(10, {"a": 4.0})
    assert len(caplog.records) == 2
    assert [points[0].value for points, _ in journal.read()] == [1.0, 2.0, 2.0, 2.0, 3.0, 4.0]
    assert [points[0].step for points, _ in journal.read()][-2:] == [9, 10]


def _take(write, file: int, line: bytes, room: int) -> int:
    if room > 0:
        return write(file, line[:room])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_it_asks_who_owns_the_run_before_it_writes(tmp_path: Path) -> None:
    asked = []
    journal = Journal(tmp_path / "j", lambda: asked.append((tmp_path / "j").stat().st_size))
    journal.sync()
    assert asked == []  # nothing to write
    for step in (1, 2):
        journal.append(step, {"a": 1.0})
    assert asked == [0, journal.size // 2]


def test_another_process_follows_what_is_appended_and_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j"
    reader = JournalReader(path)
    assert (reader.size, reader.is_boundary(0), list(reader.read())) == (0, True, [])
    journal = Journal(path)
    for step in (1, 2):
        journal.append(step, {"a": float(step)})
    content = path.read_bytes()
    for torn in (b"", b"{", content[: len(content) // 2 - 1], b"0" * 100_000):  # in the middle of a write
        path.write_bytes(content + torn)
        assert reader.size == len(content)
        assert [points[0].step for points, _ in reader.read(len(content) // 2)] == [2]
        assert reader.is_boundary(len(content)) and not reader.is_boundary(len(content) - 1)
        reader.sync()
        assert path.read_bytes() == content + torn
    path.write_bytes(content[:-1] + b"!")  # all of the last line is there, except for the end of it
    assert reader.size == len(content)
    path.write_bytes(content)
    renew(path)  # by another process that takes the run over
    Journal(path).append(3, {"a": 3.0})
    journal.append(3, {"a": 4.0})  # where nobody reads it
    assert [points[0].value for points, _ in reader.read(len(content))] == [3.0]


def test_what_a_full_disk_did_not_take_is_written_without_waiting_for_the_disk(tmp_path: Path, monkeypatch) -> None:
    journal = Journal(tmp_path / "j")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: _take(os.write, file, line, 0))
        journal.append(1, {"a": 1.0})
        assert journal.size == 0
    monkeypatch.setattr(os, "fsync", lambda file: pytest.fail("it waits for the disk"))
    journal.write_rest()
    assert [point.step for point in _points(journal)] == [1]


def test_a_file_is_on_the_disk_before_the_line_that_names_it(tmp_path: Path, monkeypatch) -> None:
    """A full disk takes neither, and keeps both in memory."""
    journal, image, sizes = Journal(tmp_path / "j"), tmp_path / "artifacts" / "a.png", []
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path, content):
        sizes.append(journal.size)
        if len(sizes) == 1:
            raise full
        write_bytes(path, content)

    monkeypatch.setattr("ksuit_runner.record.journal.write_bytes", write)
    journal.append(1, {}, files={"images/a": "a.png"}, contents={image: b"png"})
    assert journal.size == 0 and not image.exists()
    journal.append(2, {"a": 1.0})
    assert sizes == [0, 0] and image.read_bytes() == b"png"
    lines = [line for line, _ in JournalReader(tmp_path / "j").lines()]
    assert [(line.step, len(line.points), [file.path for file in line.files]) for line in lines] == [
        (1, 0, ["a.png"]), (2, 1, [])
    ]  # fmt: skip
    assert not is_damaged(tmp_path / "j") and Journal(tmp_path / "j").load_after(0)[1].keys() == {"a.png"}


@pytest.mark.parametrize("path", ["../a", "/a", "", 3])
def test_a_line_that_names_a_file_elsewhere_is_damaged(tmp_path: Path, path) -> None:
    Journal(tmp_path / "j").append(1, {"a": 1.0}, files={"images/a": path})
    assert is_damaged(tmp_path / "j") and not list(JournalReader(tmp_path / "j").lines())


def test_closing_twice_closes_no_other_file(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    journal = Journal(tmp_path / "j")
    journal.append(1, {"a": 1.0})
    journal.close()
    with open(tmp_path / "other", "wb") as other:
        journal.close()
        other.write(b"still open")
    assert os.listdir("/proc/self/fd") == before
    assert [points for points, _ in journal.read()]


def test_a_journal_of_another_process_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "j"
    assert is_damaged(path) and not path.exists()
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.append(step, {"a": float(step)})
    assert [point.step for point in read_points(path)] == [1, 2, 3]
    assert not is_damaged(path)
    content = path.read_bytes()
    path.write_bytes(content + content[:20])  # the other one is in the middle of a line
    assert not is_damaged(path)
    assert [point.step for point in read_points(path)] == [1, 2, 3]
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    path.write_bytes(damaged)
    assert is_damaged(path)
    assert [point.step for point in read_points(path)] == [1, 3]
    assert path.read_bytes() == damaged
