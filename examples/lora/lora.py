"""Low-rank adaptation: of a pretrained transformer only small matrices beside its projections are trained.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, https://arxiv.org/abs/2106.09685, as the
package peft implements it.
"""

from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ksuit_runner.data.digits import Digits
from ksuit_runner.data.tensor_dataset import TensorDataset


class TurnedDigits(TensorDataset):
    """The handwritten digits, 8x8 pixels, lying on their side.

    Args:
        split: "train" or "test".
    """

    def __init__(self, split: str) -> None:
        upright = Digits(split)
        turned = upright.inputs.rot90(1, dims=(2, 3)).contiguous()
        super().__init__(turned, upright.targets, output_shape=upright.output_shape)


class Attention(nn.Module):
    """Self-attention with projections that adapters can find by name.

    Args:
        width: Features of a token.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(batch, length, width)`` to tokens of the same shape."""
        projections = self.query(tokens), self.key(tokens), self.value(tokens)
        parts = [item.unflatten(-1, (self.heads, -1)).transpose(1, 2) for item in projections]
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return found


class Layer(nn.Module):
    """Attention and a perceptron, each added to its normalized input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), nn.Sequential(nn.Linear(width, 2 * width), nn.GELU())
        self.out = nn.Linear(2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(batch, length, width)`` to tokens of the same shape."""
        tokens = tokens + self.attention(self.norms[0](tokens))
        return tokens + self.out(self.mlp(self.norms[1](tokens)))


class Transformer(nn.Module):
    """A transformer that reads an image row by row.

    Args:
        input_shape: ``(1, rows, columns)`` of an image.
        output_shape: ``(classes,)``.
        width: Features of a token.
        depth: Number of layers.
        heads: Heads of each attention.
    """

    def __init__(
        self, input_shape: Sequence[int], output_shape: Sequence[int], width: int = 32, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        _, rows, columns = input_shape
        self.embedding = nn.Linear(columns, width)
        self.positions = nn.Parameter(0.02 * torch.randn(rows, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, output_shape[0])

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, 1, rows, columns)`` to logits ``(batch, classes)``."""
        tokens = self.embedding(images.squeeze(1)) + self.positions
        logits: Tensor = self.head(self.layers(tokens).mean(dim=1))
        return logits


def adapted(
    input_shape: Sequence[int], output_shape: Sequence[int], rank: int = 4, alpha: float = 8.0, dropout: float = 0.0
) -> nn.Module:
    """Return the transformer with adapters at its queries and values, and a head that is trained as a whole.

    Args:
        input_shape: From the data.
        output_shape: From the data.
        rank: Rank of the adapters.
        alpha: Their outputs are multiplied by ``alpha / rank``.
        dropout: Probability that an input of an adapter is dropped.
    """
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["query", "value"], modules_to_save=["head"]
    )
    model: nn.Module = get_peft_model(Transformer(input_shape, output_shape), config)
    return model
