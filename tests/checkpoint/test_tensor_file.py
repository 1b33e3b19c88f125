"""Files of tensors are what the library would write: every one is read by it."""

import errno
import json
from functools import partial

import pytest
import safetensors.torch
import torch

from ksuit_runner.checkpoint import tensor_file
from ksuit_runner.checkpoint.tensor_file import _NAMES, fits_file, is_file_type, parts, write_tensors

SPARSE = torch.eye(2).to_sparse()


@pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("fits", "make"),
    [
        *((True, partial(torch.ones, 2, dtype=dtype)) for dtype in (torch.float32, torch.bool, torch.bfloat16)),
        (True, partial(torch.nn.Parameter, torch.ones(2))),
        (False, partial(torch.ones, 2, dtype=torch.complex128)),
        (False, lambda: SPARSE),
        (False, lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])),
        (False, lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)),
        (False, partial(torch.ones, 2, device="meta")),
        (False, lambda: 1.0),
    ],
    ids=["float32", "bool", "bfloat16", "parameter", "complex", "sparse", "nested", "quantized", "meta", "number"],
)
def test_dense_tensors_fit_into_a_file(fits, make):
    assert fits_file(make()) is fits


def test_a_dtype_is_tried_once(monkeypatch):
    assert fits_file(torch.ones(2))
    monkeypatch.delattr(safetensors.torch, "load")
    assert fits_file(torch.ones(3))


def read(tensors):
    content = b"".join(parts(tensors))
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return safetensors.torch.load(content), header


def test_tensors_of_all_types_and_forms_are_read_by_the_library(bits):
    dtypes = [dtype for dtype in _NAMES if is_file_type(dtype)]
    assert len(dtypes) >= 12  # 18 with a newer safetensors than the oldest
    tensors = {str(dtype): torch.arange(7).to(dtype) for dtype in dtypes}
    forms = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 3), "one": torch.ones(1, 1, 1)}
    strided = {"transposed": torch.rand(3, 4).T, "expanded": torch.rand(3, 1).expand(3, 4), "part": torch.rand(9)[1::3]}
    tensors |= {**forms, **strided, 'name/ä~\n"': torch.ones(2, requires_grad=True)}
    found, header = read(tensors)
    assert bits(dict(sorted(found.items()))) == bits({name: tensors[name].detach() for name in sorted(tensors)})
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].itemsize == 0, "a tensor is not aligned"


def test_a_file_does_not_depend_on_the_order_of_its_tensors():
    tensors = {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.int8), "c": torch.zeros(3, dtype=torch.int64)}
    turned = dict(reversed(tensors.items()))
    assert b"".join(parts(tensors)) == b"".join(parts(turned))
    assert read({})[0] == {}


def test_memory_is_not_copied():
    tensor = torch.zeros(4)
    _, memory = parts({"a": tensor})
    tensor.fill_(1)
    assert torch.frombuffer(memory, dtype=torch.float32).equal(torch.ones(4))


def test_a_file_that_cannot_be_written_leaves_the_one_before_and_nothing_else(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    before = (tmp_path / "x.safetensors").read_bytes()

    def full(path):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(tensor_file, "sync", full)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
