"""However the files of a run are damaged, reading them returns what was written, or refuses."""

import json
import shutil
from contextlib import suppress

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pieces import piece
from stored_checkpoint import store_checkpoint
from worlds import in_threads

from ksuit_runner.checkpoint.folders import damage, has_traces, read_tags
from ksuit_runner.checkpoint.format import pack_state, read_newest
from ksuit_runner.checkpoint.manifest import MANIFEST, _seal, fingerprint, manifest_text
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.config.stored_config import parse_config
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import CheckpointError, KsuitError
from ksuit_runner.paths import PathProvider, is_run_id
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.stored_run import Launch, add_to_index, find_local, read_launch
from ksuit_runner.system.untrusted_files import UnsafeFileError

NAME = "E1_U3_S9"
ODD_NAMES = [
    "../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "C:\\x",
    "\0",
    "model.safetensors/",
    "a\nb",
    "x" * 5000,
    MANIFEST,
]
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(ODD_NAMES)
)
values = st.recursive(
    plain,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=9), below, max_size=4),
    max_leaves=12,
)
# Where a file's bytes change, and what happens there: a flipped bit, a cut, something put in or taken out.
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "put", "take"]), st.floats(0, 1, exclude_max=True), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=3,
)


def edited(content, changes):
    for kind, share, more in changes:
        offset = int(share * len(content))
        if kind == "flip" and content:
            content = content[:offset] + bytes([content[offset] ^ (1 << len(more) % 8)]) + content[offset + 1 :]
        elif kind == "cut":
            content = content[:offset]
        elif kind == "put":
            content = content[:offset] + more + content[offset:]
        elif kind == "take":
            content = content[:offset] + content[offset + len(more) :]
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with one intact checkpoint, which every example restores."""
    paths = PathProvider(tmp_path_factory.mktemp("fuzz"), "run00000")
    tensors = {"model": {"weight": torch.arange(6.0)}}
    store_checkpoint(paths, NAME, pack_state(tensors, {"trainer": {"x": 1}}))
    paths.latest.unlink()
    paths.tags.unlink()
    return paths


def paths_of(text):
    """Yield the keys that lead to every value of a manifest."""
    stack = [((), text)]
    while stack:
        keys, value = stack.pop()
        yield keys
        stack.extend(((*keys, key), below) for key, below in (value.items() if isinstance(value, dict) else ()))


@given(data=st.data())
def test_a_manifest_that_says_something_else_is_damage(whole, data):
    folder = whole.checkpoints_dir / NAME
    before = (folder / MANIFEST).read_text()
    manifest = {key: value for key, value in json.loads(before).items() if key != "crc32"}
    keys = data.draw(st.sampled_from(sorted(paths_of(manifest), key=str)))
    holder = {"": manifest}
    part, last = holder, ""
    for key in keys:
        part, last = part[last], key
    kind = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if kind == "replace" or not keys:
        part[last] = data.draw(values)
    elif kind == "remove":
        del part[last]
    else:
        part[data.draw(st.sampled_from(ODD_NAMES) | st.text(max_size=20))] = data.draw(values)
    changed = holder[""]
    try:  # also where whoever changed it has sealed it again
        text = json.dumps(changed)
        if isinstance(changed, dict) and data.draw(st.booleans()):
            with suppress(msgspec.DecodeError):  # JSON has no infinity, with which nobody can seal
                text = _seal(changed)
        (folder / MANIFEST).write_text(text)
        is_same = text == before
        # A hash and a version can be any text, and a run unfinished; whoever seals a manifest may say so.
        is_text = keys[:1] in (("config_hash",), ("versions",), ("unfinished",)) and "crc32" in text
        assert is_same or is_text or damage(folder) is not None, text
        if not is_same and not is_text:
            with pytest.raises(CheckpointError, match=NAME):
                read_newest(whole)
    finally:
        (folder / MANIFEST).write_text(before)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """A run with one intact checkpoint, of which each of two ranks has a half."""
    paths = PathProvider(tmp_path_factory.mktemp("fuzz"), "run00000")

    def save(world):
        counter = UpdateCounter(6, 2, max_epochs=100)
        counter.update = 1
        writer = CheckpointWriter(paths, world=world)
        state = {"trainer": {"m": piece(torch.ones(3, 2), world.rank, 2)}, "local": {"a": {"n": world.rank}}}
        writer.save(counter, {"w": piece(torch.ones(3), world.rank, 2)}, state, wait=True)
        writer.close()

    in_threads(2, save)
    return paths


@given(data=st.data())
def test_forged_pieces_are_an_error_or_a_whole(of_ranks, data):
    """Whoever changes them has sealed the checkpoint again."""
    folder = of_ranks.checkpoints_dir / "E0_U1_S2"
    path = folder / data.draw(st.sampled_from(["rank-0.json", "rank-1.json", "rank-1.safetensors"]))
    before, manifest = path.read_bytes(), (folder / MANIFEST).read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        index = json.loads(before)
        keys = data.draw(st.sampled_from(sorted(paths_of(index), key=str)).filter(bool))
        part = index
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = data.draw(values | st.lists(st.integers(-5, 2**63), max_size=3))
        content = json.dumps(index).encode()
    else:
        content = edited(before, data.draw(edits))
    try:
        path.write_bytes(content)
        files = {item.name: fingerprint(item) for item in folder.iterdir() if item.name != MANIFEST}
        (folder / MANIFEST).write_text(manifest_text(files, folder.name, "hash", False, {}, keep_last=2))
        with suppress(CheckpointError):
            found = read_newest(of_ranks)
            assert all(value.numel() < 100 for value in found.model.values()) and len(found.local) in (0, 2)
    finally:
        path.write_bytes(before)
        (folder / MANIFEST).write_bytes(manifest)


@given(file=st.sampled_from([MANIFEST, "model.safetensors", "trainer.safetensors", "trainer.json"]), changes=edits)
def test_a_changed_file_is_damage(whole, file, changes):
    path = whole.checkpoints_dir / NAME / file
    before = path.read_bytes()
    try:
        path.write_bytes(edited(before, changes))
        assert (damage(path.parent) is None) == (path.read_bytes() == before)
    finally:
        path.write_bytes(before)


@given(
    content=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()), name=st.text(max_size=30)
)
def test_tags_and_names_lead_to_checkpoints_that_are_there(whole, content, name):
    for path in (whole.tags, whole.latest):
        path.write_bytes(content)
    try:
        assert set(read_tags(whole).values()) <= {NAME}
        assert has_traces(whole)
        if name != NAME:
            with pytest.raises(CheckpointError, match=f"There are: {NAME}"):
                read_newest(whole, name)
    finally:
        whole.tags.unlink()
        whole.latest.unlink()


@given(changes=edits, steps=st.lists(st.integers(1, 3), max_size=5))
def test_a_journal_keeps_the_good_lines_before_the_first_bad_one(tmp_path_factory, changes, steps):
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    journal = Journal(path)
    for step, number in enumerate(steps):
        journal.append(step, {f"key{i}/é": float("nan") if i == 2 else step / 7 for i in range(number)}, 1000 + step)
    written = [str(points) for points, _ in journal.read()]
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(edited(path.read_bytes(), changes))
    kept = 0
    for line, now in zip(lines, path.read_bytes().splitlines(keepends=True), strict=False):
        if line != now:
            break
        kept += 1
    journal = Journal(path)
    found = [str(points) for points, _ in journal.read()]
    assert found[:kept] == written[:kept]
    assert set(found) <= set(written)
    assert all(isinstance(step, int) for step in journal.load_after(-1))
    journal.append(99, {"after": 1.0})
    assert [points[0].step for points, _ in journal.read()][-1] == 99
    journal.close()
    shutil.rmtree(path.parent)


@given(lines=st.lists(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_an_index_leads_to_runs_that_are_there(whole, lines):
    add_to_index(whole, whole.run_id, "calm-owl", "train")
    try:
        with open(whole.index, "ab") as file:
            file.write(b"\n".join(lines))
        for query in ("last", "calm-owl", "run00000"):
            assert find_local(whole, query) == whole.run_id
    finally:
        whole.index.unlink()


@given(
    entry=st.fixed_dictionaries({}, optional={key: values for key in ("run_id", "name", "start_time", "mode", "more")}),
    query=st.text(max_size=30),
)
def test_an_entry_of_the_index_may_be_anything(whole, entry, query):
    whole.index.write_text(json.dumps(entry) + "\n" + json.dumps({**entry, "run_id": whole.run_id, "name": "calm-owl"}))
    try:
        for text in ("last", query):
            with suppress(KsuitError):
                assert find_local(whole, text) in (None, whole.run_id)
    finally:
        whole.index.unlink()


LAUNCH = {"command": "x", "overrides": ["a=1"], "mode": "train", "origin": None, "resumed_by": []}


@given(changes=st.dictionaries(st.sampled_from([*LAUNCH, "more"]), values, max_size=3))
def test_a_launch_is_read_or_refused(whole, changes):
    whole.launch.write_text(json.dumps({**LAUNCH, **changes}))
    try:
        found = read_launch(whole)
    except KsuitError:
        return
    assert isinstance(found, Launch)
    assert all(isinstance(item, str) for item in (found.command, found.mode, *found.overrides, *found.resumed_by))
    assert found.origin is None or is_run_id(found.origin)


pieces = [
    "a",
    ": ",
    "- ",
    "\n",
    "  ",
    "[",
    "]",
    "{",
    "}",
    "&x ",
    "*x",
    "!!python/name:os.system ",
    "!x ",
    "${a}",
    "'",
    '"',
    "1",
    "? ",
]


@settings(max_examples=200)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(pieces), max_size=20).map("".join))
def test_a_config_is_read_or_refused(text):
    try:
        config = parse_config(text)
    except UnsafeFileError:
        return
    assert "${" not in str(config)
    assert parse_config(OmegaConf.to_yaml(config)) == config
