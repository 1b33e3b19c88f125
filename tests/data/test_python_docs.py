from pydoc_data.topics import topics

import pytest
import torch

from ksuit_runner.data.python_docs import VOCABULARY, PythonDocs
from ksuit_runner.errors import ConfigError


def test_shapes_and_types() -> None:
    dataset = PythonDocs("test", context_length=16)
    assert (dataset.input_shape, dataset.output_shape) == ((16,), (16, 96))
    inputs, targets = dataset[0]
    assert inputs.shape == targets.shape == (16,)
    assert inputs.dtype == targets.dtype == torch.int64


def test_vocabulary_is_newline_and_printable_ascii() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 96
    assert all(character == "\n" or (character.isascii() and character.isprintable()) for character in VOCABULARY)


def test_encode_takes_the_nearest_character_and_decode_is_its_inverse() -> None:
    assert PythonDocs.decode(PythonDocs.encode(VOCABULARY)) == VOCABULARY
    assert PythonDocs.decode(PythonDocs.encode("‘a’ “b” – — … ß°\t\r\x7f")) == "'a' \"b\" - - ... ?? ??"  # noqa: RUF001
    assert PythonDocs.decode([1, 0]) == " \n"
    assert PythonDocs.encode("").tolist() == []


def test_splits_are_the_whole_text_in_order() -> None:
    text = PythonDocs.decode(PythonDocs.encode("".join(topics[key] for key in sorted(topics))))
    train, test = (PythonDocs(split, context_length=1) for split in ("train", "test"))
    # Windows of one character leave out only the last one of each split: it has no successor in it.
    parts = [torch.cat([part.inputs[:, 0], part.targets[-1]]) for part in (train, test)]
    assert "".join(PythonDocs.decode(part) for part in parts) == text
    assert len(parts[1]) == round(0.1 * len(text))


@pytest.mark.parametrize("stride", [None, 1, 5, 100])
def test_windows_start_a_stride_apart_and_targets_are_one_later(stride: int | None) -> None:
    dataset = PythonDocs("test", context_length=32, stride=stride)
    step = stride or 32
    text = PythonDocs("test", context_length=1)
    tokens = torch.cat([text.inputs[:, 0], text.targets[-1]])
    for index in (0, 1, len(dataset) - 1):
        inputs, targets = dataset[index]
        assert torch.equal(inputs, tokens[index * step : index * step + 32])
        assert torch.equal(targets, tokens[index * step + 1 : index * step + 33])
    assert len(tokens) - step < (len(dataset) - 1) * step + 33 <= len(tokens)


def test_batch_equals_stacked_samples() -> None:
    dataset = PythonDocs("test", context_length=8, stride=3)
    inputs, targets = dataset.__getitems__([9, 2, 2])
    samples = [dataset[index] for index in (9, 2, 2)]
    assert torch.equal(inputs, torch.stack([sample[0] for sample in samples]))
    assert torch.equal(targets, torch.stack([sample[1] for sample in samples]))
    assert inputs.is_contiguous() and targets.is_contiguous()


def test_small_stride_keeps_one_copy_of_the_text() -> None:
    dataset = PythonDocs("train", stride=1)
    assert dataset.inputs.untyped_storage().data_ptr() == dataset.targets.untyped_storage().data_ptr()
    assert dataset.inputs.untyped_storage().nbytes() < 16 * len(dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, "Did you mean 'train'"),
        ({"context_length": 0}, "context_length: a whole number of at least 1"),
        ({"context_length": 10**6}, "is too long"),
        ({"stride": 0}, "stride: a whole number of at least 1"),
        ({"test_fraction": 1}, "test_fraction: a number between"),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PythonDocs(**{"split": "train", **arguments})
