"""Python's own help texts, character by character: real text for language modelling, without a download."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ksuit_runner.config.types import FractionBelowOne, OpenFraction, PositiveInt, check_numbers
from ksuit_runner.data.tensor_dataset import Split, TensorDataset, check_split
from ksuit_runner.errors import ConfigError

VOCABULARY = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
"""The 96 characters of the text, a token being the index of one: newline and printable ASCII."""

_NEAREST = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\t": " ", "\N{NO-BREAK SPACE}": " "}  # noqa: RUF001
)


class PythonDocs(TensorDataset):
    """The language reference that ``help()`` shows (about 460,000 characters), to predict the next character.

    A sample is a window of the text: inputs are int64 tokens of shape ``(context_length,)``, targets the tokens one
    position later; ``output_shape`` is ``(context_length, len(VOCABULARY))``. The text is the one of the running
    Python and differs a little between versions; the vocabulary never does.

    Args:
        split: "train" for the first part of the text, "test" for the last, "validation" for what is before that.
        context_length: Number of characters that a model sees at once.
        stride: Distance between the starts of two windows, in characters; ``context_length`` if None.
        test_fraction: Share of the text in the test split, between 0 and 1.
        validation_fraction: Share of the other text in the validation split, from 0 to below 1.

    Raises:
        ConfigError: If an argument is out of its range or the split is shorter than one window.
    """

    def __init__(
        self,
        split: Split,
        context_length: PositiveInt = 64,
        stride: PositiveInt | None = None,
        test_fraction: OpenFraction = 0.1,
        validation_fraction: FractionBelowOne = 0.0,
    ) -> None:
        check_split(split, test_fraction, validation_fraction)
        stride = context_length if stride is None else stride
        check_numbers("PositiveInt", context_length=context_length, stride=stride)
        tokens = self.encode(_read_text())
        before_test = len(tokens) - round(test_fraction * len(tokens))
        train_count = before_test - round(validation_fraction * before_test)
        start, end = {"train": (0, train_count), "validation": (train_count, before_test)}.get(
            split, (before_test, None)
        )
        part = tokens[start:end]
        if len(part) <= context_length:
            raise ConfigError(f"context_length: {context_length} is too long, the {split} text has {len(part)} tokens.")
        # Overlapping views of one text, so that a small stride takes no more memory than a large one.
        windows = part.unfold(0, context_length + 1, stride)
        super().__init__(windows[:, :-1], windows[:, 1:], output_shape=(context_length, len(VOCABULARY)))

    @staticmethod
    def encode(text: str) -> Tensor:
        """Return the tokens of a text, shape ``(length,)``; characters without a near one become '?'."""
        lookup = np.full(256, VOCABULARY.index("?"))
        lookup[list(VOCABULARY.encode())] = np.arange(len(VOCABULARY))
        characters = text.translate(_NEAREST).encode("ascii", errors="replace")
        return torch.from_numpy(lookup[np.frombuffer(characters, dtype=np.uint8)])

    @staticmethod
    def decode(tokens: Sequence[int] | Tensor) -> str:
        """Return the text of tokens of shape ``(length,)``."""
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        return "".join(VOCABULARY[number] for number in numbers)


def _read_text() -> str:
    from pydoc_data.topics import topics  # half a megabyte of text: imported only if needed

    return "".join(topics[key] for key in sorted(topics))
