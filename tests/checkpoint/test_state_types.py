"""States are restored from a file with their types, and anything else is refused with the path to it."""

import enum
import io
import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ksuit_runner.checkpoint.state_types import copy_state, pack, unpack
from ksuit_runner.errors import CheckpointError

Point = namedtuple("Point", "x y")
Color = enum.Enum("Color", "RED")
Number = enum.IntEnum("Number", "ONE")

STATES = {
    "plain": {"a": [1, 2.5, "x", None, (True, b"y", 1j, 10**40)], "b": {}, "c": -math.inf},
    "torch's values": [torch.Size([1, 2]), torch.float16, torch.device("cpu")],
    "numbers of numpy": [np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True), np.datetime64("2020-01-01")],
    "array": [np.arange(6.0).reshape(2, 3).T, np.array(1), np.array(["ä", "bc"]), np.zeros(0, np.int8)],
    "structured array": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "keys": {1: "int", "1": "text", (2, "b"): "tuple", None: "none", 1.5: "number"},
    "keys of numpy": {np.int64(3): [np.float64(1.5)], frozenset([1]): 2},
    "a key that stands for a kind": {"__kind__": "set", "items": [1]},
    "sets": [{1, 2}, frozenset(["a"]), {(1, np.int64(2))}],
    "deque": deque([1, deque([2])], maxlen=3),
    "ordered": OrderedDict(b=1, a=OrderedDict(c=deque([2]))),
    "default": [defaultdict(list, a=[1.0]), defaultdict(None, {2: 3}), defaultdict(lambda: 0).__class__(int)],
    "counter": Counter("aab"),
    "path and bytes": [Path("a") / "b", bytearray(b"ab")],
}
REFUSED = {
    "enum": Color.RED,
    "enum of int": Number.ONE,
    "named tuple": Point(1, 2),
    "array of objects": np.array([None]),
    "masked array": np.ma.array([1]),
    "defaultdict of a function": defaultdict(lambda: 0),
    "module": nn.Linear(1, 1),
    "function": math.sqrt,
    "iterator": iter([1]),
    "dict of its own": type("Mine", (dict,), {})(),
    "text of its own": type("Text", (str,), {})("a"),
}


def stored(state):
    file = io.BytesIO()
    torch.save(pack("state", state), file)
    file.seek(0)
    return unpack(torch.load(file, weights_only=True))


def same(one, other):
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.strides == other.strides and one.tolist() == other.tolist()
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items())) and type(one) is type(other)
    if isinstance(one, list | tuple | deque):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("way", [stored, lambda state: copy_state("state", state)], ids=["stored", "copied"])
def test_a_state_is_restored_as_it_was(name, way):
    found = way(STATES[name])
    assert same(found, STATES[name]), found
    if isinstance(found, deque):
        assert found.maxlen == STATES[name].maxlen


def test_a_default_is_still_one():
    assert stored(STATES["default"])[0]["new"] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_all_kinds_are_restored():
    dense, nested = torch.rand(2, 3, dtype=torch.complex128), torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    sparse = [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()]
    found = stored([dense, quantized, nested, *sparse, nn.Parameter(torch.ones(2), requires_grad=False)])
    assert found[0].equal(dense) and found[1].equal(quantized) and repr(found[2]) == repr(nested)
    assert [item.layout for item in found[3:5]] == [torch.sparse_coo, torch.sparse_csr]
    assert type(found[5]) is nn.Parameter and not found[5].requires_grad


@pytest.mark.parametrize("way", [pack, copy_state])
@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_with_the_path_to_it(name, way):
    state = {"a": [0, {"b": REFUSED[name]}]}
    with pytest.raises(CheckpointError, match=r"^trainer\['a'\]\[1\]\['b'\]: an? .* cannot be stored"):
        way("trainer", state)


def test_a_tensor_without_data_is_refused():
    with pytest.raises(CheckpointError, match=r"^model\['w'\]: a tensor without data"):
        pack("model", {"w": torch.empty(1, device="meta")})


def test_a_state_that_contains_itself_is_refused():
    state = []
    state.append(state)
    with pytest.raises(CheckpointError, match="^trainer: it is nested too deep"):
        pack("trainer", state)


def test_a_copy_shares_nothing_that_changes():
    state = {"a": [torch.zeros(1)], "b": {1}, "c": deque([np.zeros(1)]), "d": bytearray(b"a")}
    copied = copy_state("state", state)
    packed = pack("state", {key: state[key] for key in "bcd"})
    state["a"][0].add_(1)
    state["b"].add(2)
    state["c"][0][0] = 1
    state["d"].append(0)
    for found in (copied, unpack(packed)):
        assert (found["b"], found["c"][0].tolist(), found["d"]) == ({1}, [0.0], bytearray(b"a"))
    assert copied["a"][0].tolist() == [0]


@pytest.mark.parametrize("packed", [{"__kind__": "object"}, {"__kind__": []}, {"__kind__": "deque"}])
def test_what_was_not_packed_is_refused(packed):
    with pytest.raises(ValueError, match="unknown type"):
        unpack([packed])
