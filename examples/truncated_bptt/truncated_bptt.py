"""Truncated backpropagation through time: the hidden state is carried from update to update, and so is the run's.

P. J. Werbos, "Backpropagation through time: what it does and how to do it", 1990.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ksuit_runner import SgdTrainer

SYMBOLS = 4
QUERY = SYMBOLS  # asks for the last symbol; most steps hold none
NOTHING = SYMBOLS + 1
NO_TARGET = -1


class Pieces:
    """Sequences in which a query asks for the last symbol before it, mostly one of an earlier piece.

    A sample is a piece of one sequence: ``{"steps": (length,), "row": (), "is_first": ()}`` and targets of (length,).
    In their order come the first pieces of all sequences, then the second ones, and so on.

    Args:
        sequences: Number of sequences.
        pieces: Number of pieces in each.
        length: Number of steps in each piece.
        seed: Seed that they are drawn from.
    """

    def __init__(self, sequences: int, pieces: int, length: int, seed: int) -> None:
        self.sequences, self.length = sequences, length
        generator = torch.Generator().manual_seed(seed)
        shape = sequences, pieces * length
        kind = torch.rand(shape, generator=generator)
        symbols = torch.randint(SYMBOLS, shape, generator=generator)
        self.steps = torch.where(kind < 0.05, symbols, torch.where(kind < 0.3, QUERY, NOTHING))
        self.steps[:, 0] = symbols[:, 0]
        self.targets = torch.full(shape, NO_TARGET)
        last = self.steps[:, 0]
        for step in range(1, shape[1]):
            now = self.steps[:, step]
            self.targets[:, step] = torch.where(now == QUERY, last, NO_TARGET)
            last = torch.where(now < SYMBOLS, now, last)

    def __len__(self) -> int:
        return self.steps.numel() // self.length

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        piece, row = divmod(index, self.sequences)
        part = slice(piece * self.length, (piece + 1) * self.length)
        inputs = {"steps": self.steps[row, part], "row": torch.tensor(row), "is_first": torch.tensor(piece == 0)}
        return inputs, self.targets[row, part]


class Recurrent(nn.Module):
    """Reads steps of (sequences, length) from a hidden state of (sequences, hidden_dim).

    Args:
        hidden_dim: Width of the hidden state.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.embedding = nn.Embedding(SYMBOLS + 2, hidden_dim)
        self.gru = nn.GRU(hidden_dim, hidden_dim, batch_first=True)
        self.head = nn.Linear(hidden_dim, SYMBOLS)

    def forward(self, steps: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores of (sequences, length, symbols), and the hidden state after the last step."""
        outputs, hidden = self.gru(self.embedding(steps), hidden[None])
        return self.head(outputs), hidden[0]


class TbpttTrainer(SgdTrainer):
    """Begins every piece with the hidden state that the one before it has left, without its graph."""

    evaluates_in_order = True  # else ranks would share the batches of an evaluation

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden = self._zeros()
        self._evaluated: dict[nn.Module, Tensor] = {}

    def training_step(self, batch: Any, model: nn.Module) -> tuple[Any, Any]:
        """Return the mean over the steps with a target, with their number, and the scores."""
        inputs, targets = batch
        # Evaluations have hidden states of their own: they must not change what training carries.
        carried = self.hidden if model.training else self._evaluated.get(model, self._zeros())
        hidden = carried[inputs["row"]] * ~inputs["is_first"][:, None]
        scores, hidden = model(inputs["steps"], hidden)
        carried = carried.index_copy(0, inputs["row"], hidden.detach().to(carried.dtype))
        if model.training:
            self.hidden = carried
        else:
            self._evaluated[model] = carried
        loss = self.loss(scores.flatten(0, 1), targets.flatten())
        return (loss, (targets != NO_TARGET).sum()), scores

    def extra_state(self) -> dict[str, Tensor]:
        """Return the hidden state: a resumed run continues in the middle of the sequences."""
        return {"hidden": self.hidden}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore it, after a resume or when an update was skipped."""
        self.hidden = state["hidden"].to(self.device)

    def _zeros(self) -> Tensor:
        data = self.data_container.datasets["train"]
        return torch.zeros(data.sequences, self.model.module.hidden_dim, device=self.device)
