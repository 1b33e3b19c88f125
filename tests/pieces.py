"""What each rank has of a tensor, or of a whole state, that is spread over the ranks of a run."""

import torch

from ksuit_runner.distributed.pieces import Piece


def piece(tensor, rank, size, dim=0):
    """Return what a rank has of a tensor that is cut along a dimension as evenly as torch does."""
    each = -(-tensor.shape[dim] // size)
    start = min(rank * each, tensor.shape[dim])
    length = min(each, tensor.shape[dim] - start)
    offset = [0] * tensor.ndim
    offset[dim] = start
    return Piece(tensor.narrow(dim, start, length).clone(), tuple(offset), tuple(tensor.shape))


def blocks(tensor, rows, columns, rank):
    """Return what a rank has of a matrix that is cut into ``rows`` times ``columns`` blocks."""
    found = piece(tensor, rank // columns, rows)
    inner = piece(found.tensor, rank % columns, columns, dim=1)
    return Piece(inner.tensor, (found.offset[0], inner.offset[1]), tuple(tensor.shape))


def state_of(rank, size, seed=0):
    """Return the model's values, a callback's file, and the state, of which a rank has its pieces."""
    draws = torch.Generator().manual_seed(seed)
    uneven, matrix, tiny = (torch.randn(shape, generator=draws) for shape in ((7, 3), (8, 6), (1, 2)))
    model = {
        "uneven": piece(uneven, rank, size),
        "columns": piece(matrix, rank, size, dim=1),
        "tiny": piece(tiny, rank, size),
        "half": piece(uneven.bfloat16(), rank, size),
        "everywhere": torch.arange(3),
    }
    ema = {"uneven": piece(uneven / 2, rank, size)}
    optimizer = {"uneven": {"exp_avg": piece(uneven * 2, rank, size), "step": torch.tensor(5.0)}}
    whole = {
        "uneven": uneven,
        "columns": matrix,
        "tiny": tiny,
        "half": uneven.bfloat16(),
        "everywhere": torch.arange(3),
    }
    return model, ema, {"trainer": {"optimizer": optimizer}, "callbacks": {"a": {"n": 1}}}, whole
