import pytest

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.name_patterns import matching, matching_modules

NAMES = ["blocks", "blocks.0", "blocks.0.mlp", "blocks.0.mlp.0", "blocks.12", "blocks.x", "head"]


def test_a_number_stands_for_a_layer_and_not_for_what_is_in_it():
    assert matching("blocks.{}", NAMES) == ["blocks.0", "blocks.12"]
    assert matching("blocks.{}.mlp.{}", NAMES) == ["blocks.0.mlp.0"]
    assert matching("*.{}", NAMES) == ["blocks.0", "blocks.0.mlp.0", "blocks.12"]
    assert matching("head", NAMES) == ["head"]


def test_each_module_is_found_once_and_every_pattern_has_to_match():
    assert matching_modules(["blocks.{}", "*.12", "head"], NAMES, "a.b") == ["blocks.0", "blocks.12", "head"]
    with pytest.raises(ConfigError, match=r"^a\.b: 'block\.{}' matches no module\. Did you mean 'blocks") as error:
        matching_modules(["head", "block.{}"], NAMES, "a.b")
    assert error.value.path == "a.b"
