"""Pieces of tensors, for every rank of worlds in which torch's fake group only pretends that there are others."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ksuit_runner.distributed.pieces import Piece, StoredTensor, is_sharded, local, piece_of, place


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class File(StoredTensor):
    """A tensor of which blocks are read."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self.shape, self.dtype, self.numel_read = whole, whole.shape, whole.dtype, 0

    def read(self, offset, size):
        self.numel_read += torch.Size(size).numel()
        return block(self.whole, offset, size).clone()


def block(whole: Tensor, offset, size) -> Tensor:
    return whole[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]


def block_of(piece: Piece | None, whole: Tensor) -> Tensor:
    assert piece is not None
    assert piece.shape == whole.shape
    return block(whole, piece.offset, piece.tensor.shape)


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_pieces_of_all_ranks_cover_a_tensor_whose_rows_do_not_divide(rows):
    whole, covered = torch.arange(rows * 3.0).view(rows, 3), torch.zeros(rows, 3)
    for rank in range(4):
        with rank_of(rank, 4):
            mesh = init_device_mesh("cpu", (4,))
            spread = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
            piece = piece_of(spread)
            assert is_sharded(spread)
            assert local(spread).data_ptr() == piece.tensor.data_ptr()
            assert torch.equal(block_of(piece, whole), piece.tensor)
            block_of(piece, covered).add_(1)
            file = File(whole)
            for source in (whole, file):
                again = place(source, spread)
                assert (again.shape, again.placements) == (spread.shape, spread.placements)
                assert torch.equal(local(again), piece.tensor)
            assert file.numel_read == piece.tensor.numel()  # and nothing else of it
    assert (covered == 1).all()


def test_of_the_ranks_with_the_same_block_the_first_stores_it():
    whole, found = torch.arange(6.0).view(3, 2), []
    for rank in range(4):
        with rank_of(rank, 4):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
            spread = distribute_tensor(whole, mesh, [Replicate(), Shard(0)], src_data_rank=None)
            piece = piece_of(spread)
            assert torch.equal(block_of(piece, whole), piece.tensor)
            found.append((piece.offset, piece.is_copy))
    assert found == [((0, 0), False), ((2, 0), False), ((0, 0), True), ((2, 0), True)]


def test_a_tensor_of_one_process_is_what_it_is():
    whole = torch.arange(6.0).view(3, 2)
    assert piece_of(whole) is None
    assert place(whole, torch.zeros(3, 2)) is whole
    assert torch.equal(place(File(whole), torch.zeros(3, 2)), whole)
    assert local(whole) is whole


def test_torch_has_the_private_names_that_ranks_rely_on():
    from torch.distributed import distributed_c10d
    from torch.distributed.tensor import _utils

    assert callable(_utils.compute_local_shape_and_global_offset) and callable(distributed_c10d._abort_process_group)
