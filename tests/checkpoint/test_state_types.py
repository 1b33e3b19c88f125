"""States are restored from a file with their types, and anything else is refused with the path to it."""

import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ksuit_runner.checkpoint.state_types import _UNPACKERS, KIND, MOST_LEVELS, Packer, copy_state, unpack
from ksuit_runner.checkpoint.tensor_file import parts
from ksuit_runner.errors import CheckpointError

Point = namedtuple("Point", "x y")
Color = enum.Enum("Color", "RED")
Number = enum.IntEnum("Number", "ONE")

NANS = [struct.unpack(">d", bytes.fromhex(text))[0] for text in ("7ff8000000000001", "fff8000000000000")]

STATES = {
    "plain": {"a": [1, 2.5, "x", None, (True, b"y", 1j, 10**40, -(10**5000))], "b": {}, "c": -math.inf},
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
    "texts": ["ä", "\ud800", {"\udfff": 1, "ä": 2}, Path("\udce4")],
    "rare arrays": [np.ones(3, ">f4"), np.ones(2, complex), np.ones(2, np.longdouble), np.complex64(1j)],
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
    "tensor without data": lambda: deque([torch.empty(1, device="meta")]),
    "tensor, quantized": lambda: deque([torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)]),
    "tensor, nested": lambda: deque([torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])]),
}


def pack(location, state):
    return Packer().pack(location, state, "")


def stored(state):
    packer = Packer()
    document = packer.pack("state", state, "/x")
    text = msgspec.json.encode(document)
    json.loads(text, parse_constant=pytest.fail)
    tensors = safetensors.torch.load(b"".join(parts(packer.tensors)))
    assert tensors.keys() == set(keys_of({"x": document}))
    return unpack(msgspec.json.decode(text), tensors)


def keys_of(document, at=""):
    """Yield the key of every tensor, and check that it is where that points to."""
    if isinstance(document, dict) and document.get(KIND) == "tensor":
        assert document["key"] == at
        yield at
    below = enumerate(document) if isinstance(document, list) else getattr(document, "items", tuple)()
    for key, value in below:
        yield from keys_of(value, f"{at}/{str(key).replace('~', '~0').replace('/', '~1')}")


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


def raw(number):
    return struct.pack(">d", number)


@given(st.floats(allow_nan=True, width=64) | st.sampled_from([-0.0, math.nan, -math.nan, *NANS, 5e-324, 1e22, 1e16]))
def test_every_float_is_restored_bit_by_bit(number):
    (found,) = stored([number])
    assert type(found) is float and raw(found) == raw(number)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.text() | st.binary(),
    lambda below: (
        st.lists(below)
        | st.tuples(below, below)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.none()), below)
        | st.frozensets(st.integers()).map(lambda items: [items, deque(items, 7), OrderedDict.fromkeys(items, 0)])
    ),
)


@given(plain)
def test_plain_values_are_restored_with_their_types(state):
    assert same(stored(state), state)


LAYOUTS = {
    "row-major": torch.rand(2, 3),
    "transposed": torch.rand(2, 3).T,
    "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels last of a single pixel": torch.rand(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "empty": torch.rand(0, 3).T,
    "scalar": torch.tensor(1.5),
    "transposed, complex": torch.rand(2, 3, dtype=torch.complex128).T,
    "part of a larger one": torch.rand(4, 5)[:, 1:3].contiguous(),
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    LAYOUTS["transposed, of a type that no file has"] = torch.rand(2, 3).to(torch.float8_e8m0fnu).T


@pytest.mark.parametrize("way", [stored, lambda state: copy_state("state", state)], ids=["stored", "copied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_are_restored_with_layout_and_type_in_memory_of_their_own(bits, name, way):
    tensor = LAYOUTS[name]
    (found,) = way(deque([tensor]))
    assert (found.stride(), found.dtype, found.shape) == (tensor.stride(), tensor.dtype, tensor.shape)
    assert found.is_complex() or bits(found) == bits(tensor)
    assert not found.is_complex() or found.equal(tensor)
    assert not found.numel() or found.data_ptr() != tensor.data_ptr()


def test_overlaps_and_gaps_in_memory_are_not_stored():
    views = [np.arange(4)[::-1], np.broadcast_to(np.ones(2), (3, 2)), np.ones((4, 4), np.int8)[:, ::2]]
    for one, other in zip(stored(views), views, strict=True):
        assert one.dtype == other.dtype and one.tolist() == other.tolist() and one.flags.c_contiguous
    expanded, part = torch.rand(3, 1).expand(3, 4), torch.rand(4, 5)[:, 1:3]
    found = stored([expanded, part, torch.view_as_complex(torch.rand(3, 2)).conj()])
    assert found[0].equal(expanded) and found[1].equal(part) and found[1].is_contiguous()
    assert found[2].dtype == torch.complex64


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_and_parameters_are_restored():
    eye = torch.eye(4, dtype=torch.float64)
    doubled = torch.sparse_coo_tensor(torch.tensor([[0, 0], [1, 1]]), torch.ones(2), (2, 2))
    formats = [eye.to_sparse_csr(), eye.to_sparse_csc(), eye.to_sparse_bsr((2, 2)), eye.to_sparse_bsc((2, 2))]
    sparse = [eye.to_sparse(), eye.to_sparse() * 1j, doubled, *formats]
    found = stored([*sparse, nn.Parameter(torch.ones(2), requires_grad=False)])
    for one, other in zip(found, sparse, strict=False):
        assert (one.layout, one.dtype) == (other.layout, other.dtype) and one.to_dense().equal(other.to_dense())
    assert (found[0].is_coalesced(), found[2].is_coalesced(), found[2]._nnz()) == (True, False, 2)
    assert type(found[-1]) is nn.Parameter and not found[-1].requires_grad


def test_a_tensor_that_is_there_twice_is_restored_twice():
    tensor = torch.ones(2)
    found = stored({"a": tensor, "b": [tensor]})
    assert found["a"].equal(found["b"][0]) and found["a"].data_ptr() != found["b"][0].data_ptr()


def test_tensors_at_places_that_look_alike_are_distinguished():
    one, two, three, four = (torch.tensor(number) for number in (1, 2, 3, 4))
    found = stored({"a/b": one, "a": {"b": two}, "a~1b": three, "": four, "n": {1: one, "1": two}})
    assert [found["a/b"], found["a"]["b"], found["a~1b"], found[""]] == [1, 2, 3, 4]
    assert (found["n"][1], found["n"]["1"]) == (1, 2)


@pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("way", [pack, copy_state])
@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_with_the_path_to_it(name, way):
    value = REFUSED[name]
    state = {"a": [0, {"b": value() if name.startswith("tensor") else value}]}
    with pytest.raises(CheckpointError, match=r"^trainer\['a'\]\[1\]\['b'\](\[0\])?: an? .* cannot be stored"):
        way("trainer", state)


def test_a_state_that_contains_itself_is_refused():
    state = []
    state.append(state)
    with pytest.raises(CheckpointError, match="^trainer: it is nested too deep"):
        pack("trainer", state)


def test_a_copy_shares_nothing_that_changes():
    state = {"a": [torch.zeros(1)], "b": {1}, "c": deque([np.zeros(1)]), "d": bytearray(b"a")}
    copied = copy_state("state", state)
    packed = pack("state", {key: state[key] for key in "bd"})
    state["a"][0].add_(1)
    state["b"].add(2)
    state["c"][0][0] = 1
    state["d"].append(0)
    for found in (copied, unpack(packed, {})):
        assert (found["b"], found["d"]) == ({1}, bytearray(b"a"))
    assert copied["a"][0].tolist() == copied["c"][0].tolist() == [0]


@pytest.mark.parametrize("level", [MOST_LEVELS, MOST_LEVELS + 1])
def test_what_can_be_stored_is_never_nested_too_deep_to_be_read(level):
    state = 1
    for _ in range(level):
        state = OrderedDict(x=state)
    if level == MOST_LEVELS:
        assert stored(state) == state
    else:
        with pytest.raises(CheckpointError, match="^state: it is nested too deep"):
            stored(state)


TENSORS = {"/x": torch.arange(6.0).reshape(2, 3), "/y": torch.ones(2, 2, dtype=torch.uint8)}
X, Y = ({KIND: "tensor", "key": key} for key in TENSORS)


@pytest.mark.parametrize(
    "packed",
    [
        *({KIND: name} for name in ("object", "", [], None, {}, 1, "tensor", "deque", "ndarray", "sparse_coo", "dict")),
        *([X, Y, more] for more in (X, {KIND: "tensor", "key": "/z"}, {KIND: "tensor", "key": []})),
        *([X], [], [Y, {**X, "more": 1}], [Y, {**X, "self": 1}]),
        *([Y, {**X, "dtype": name}] for name in ("complex64", "uint8", "__class__", [], "load")),
        *([X, {**Y, "dtype": name}] for name in ("float32", "complex64")),
        *(
            [Y, {**X, "strides": strides}]
            for strides in ([], [1], [1, 1], [0, 0], [2, 1], [-3, 1], [9**9, 1], ["3", 1])
        ),
        *([Y, {KIND: name, "tensor": X, "items": X}] for name in ("list", "set", "tuple", "ndarray")),
        *([X, Y, {KIND: name, "items": [[1]]}] for name in ("dict", "OrderedDict", "Counter")),
        *([X, Y, {KIND: "float", "value": value}] for value in ("x", 1, None, [], "nan(0)", "1e5x")),
        *([X, Y, {KIND: "int", "value": value}] for value in ("", 1, "zz", [], None)),
        *([X, Y, {KIND: "bytes", "base64": value}] for value in ("*", 1, "a", None)),
        *([X, Y, {KIND: "number", "dtype": name, "value": 1}] for name in ("object", "str", [], "float128")),
        *([X, Y, {KIND: "ndarray", "npy": text}] for text in ("", "gANjb3MKc3lzdGVtCg==")),
        *([X, Y, {KIND: "defaultdict", "factory": name, "items": []}] for name in ("eval", [], "__import__")),
        *([X, Y, {KIND: "dtype", "name": name}] for name in ("load", "nn", None)),
        [X, Y, {KIND: "device", "name": "moon"}],
        [X, Y, {KIND: "Path", "path": 1}],
        [X, Y, {KIND: "set", "items": [[]]}],
        [Y, {KIND: "Parameter", "data": [X], "requires_grad": True}],
        [X, {KIND: "Parameter", "data": Y, "requires_grad": True}],
        {KIND: "sparse_coo", "indices": X, "values": Y, "shape": [2, 2], "is_coalesced": True},
        {KIND: "sparse_csr", "pointers": X, "indices": Y, "values": X, "shape": [2, 2]},
        {KIND: "sparse_csr", "layout": "x", "pointers": X, "indices": Y, "values": X, "shape": [2, 2]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_was_not_packed_is_refused(packed):
    with pytest.raises(ValueError, match="^it |^its |."):
        unpack(packed, TENSORS)


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(_UNPACKERS)),
    fields=st.dictionaries(
        st.sampled_from(["items", "value", "key", "dtype", "shape", "base64", "name", "npy", "maxlen", "data", "self"]),
        st.recursive(st.none() | st.integers() | st.text() | st.floats(), st.lists, max_leaves=4) | st.just(X),
        max_size=3,
    ),
)
def test_an_object_with_any_fields_is_read_or_refused(name, fields):
    with suppress(ValueError):
        unpack([{KIND: name, **fields}], TENSORS)
