"""Decoder-only transformer for language modelling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ksuit_runner.config.types import FractionBelowOne, PositiveInt, check_numbers
from ksuit_runner.errors import ConfigError


class Gpt(nn.Module):
    """Transformer that predicts the next token from the ones before it.

    The architecture and initialization of GPT-2 (Radford et al., "Language Models are Unsupervised Multitask
    Learners", 2019): causal self-attention (Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762),
    normalization before each sublayer (Xiong et al., 2020, arXiv:2002.04745), GELU (Hendrycks and Gimpel, 2016,
    arXiv:1606.08415), learned positions, and a head that is the token embedding itself (Press and Wolf, 2017,
    arXiv:1608.05859). Weights start with standard deviation 0.02, those that write to the residual stream with
    ``0.02 / sqrt(2 * depth)``.

    Args:
        input_shape: ``(context_length,)``.
        output_shape: ``(context_length, vocabulary_size)``.
        embed_dim: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Number of attention heads; divides ``embed_dim``.
        mlp_ratio: Hidden units of a block's MLP per unit of ``embed_dim``.
        dropout: Probability of dropout on embeddings, attention weights and sublayer outputs in training.

    Raises:
        ConfigError: If the data does not consist of token sequences or a number is out of its range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        embed_dim: PositiveInt = 128,
        depth: PositiveInt = 4,
        num_heads: PositiveInt = 4,
        mlp_ratio: PositiveInt = 4,
        dropout: FractionBelowOne = 0.0,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1 or len(output_shape) != 2 or input_shape[0] != output_shape[0]:
            shapes = f"{tuple(input_shape)} and {tuple(output_shape)}"
            raise ConfigError(
                f"input_shape, output_shape: Gpt needs (context,) and (context, vocabulary), got {shapes}."
            )
        check_numbers("PositiveInt", embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        if embed_dim % num_heads:
            raise ConfigError(f"num_heads: {num_heads} heads do not divide embed_dim {embed_dim}.")
        check_numbers("FractionBelowOne", dropout=dropout)
        self.context_length, vocabulary_size = output_shape
        self.token_embedding = nn.Embedding(vocabulary_size, embed_dim)
        self.position_embedding = nn.Embedding(self.context_length, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(embed_dim, num_heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self._initialize(depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(batch, length)`` to the logits of the next ones, ``(batch, length, vocabulary_size)``.

        Raises:
            ConfigError: If the sequences are longer than ``context_length``.
        """
        length = x.shape[1]
        if length > self.context_length:
            raise ConfigError(f"Gpt: sequences of {length} tokens, but the context is {self.context_length} long.")
        positions = torch.arange(length, device=x.device)
        x = self.dropout(self.token_embedding(x) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        # The head has no parameter of its own, so that a checkpoint holds the shared weight once.
        logits: Tensor = F.linear(self.norm(x), self.token_embedding.weight)
        return logits

    def _initialize(self, depth: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes_residual = name.endswith(("attention.project", "mlp.project"))
                nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if writes_residual else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


class _Block(nn.Module):
    """Attention and MLP, each added to the residual stream ``(batch, length, embed_dim)``."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.attention = _Attention(embed_dim, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(embed_dim)
        self.mlp = _Mlp(embed_dim, mlp_ratio)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = x + self.dropout(self.attention(self.attention_norm(x)))
        transformed: Tensor = attended + self.dropout(self.mlp(self.mlp_norm(attended)))
        return transformed


class _Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(embed_dim, 3 * embed_dim)
        self.project = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(x).unflatten(2, (3, self.num_heads, -1))  # batch, length, 3, heads, head_dim
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.project(attended.transpose(1, 2).flatten(start_dim=2))
        return projected


class _Mlp(nn.Module):
    """Two layers on each position by itself."""

    def __init__(self, embed_dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.expand = nn.Linear(embed_dim, mlp_ratio * embed_dim)
        self.project = nn.Linear(mlp_ratio * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.project(F.gelu(self.expand(x), approximate="tanh"))
        return projected
