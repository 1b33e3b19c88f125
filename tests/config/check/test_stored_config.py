"""A config that is written down and read back says the same."""

import math

from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ksuit_runner.config.compose import compose_config
from ksuit_runner.config.stored_config import format_config, parse_config

WORDS = """
    1 1.5 1e3 1e-3 -1 +1 0x1 0o7 0b1 1_000 .5 5. . - ~ null Null true True yes y on off inf .inf -.inf nan .nan 12:30:45
    2024-01-01 = << * & ! % @ ` | > [ { } ] , ? : # é a: a#b '' " \\ --- ... E1_U2_S3 torch.nn.Linear accuracy/test _ e3
"""
LIKE_SOMETHING_ELSE = [*WORDS.split(), "", " ", " a", "a ", "a b", "a: b", "a #b", "a\nb", "a\n", "\ta"]
readable = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="$")
texts = st.sampled_from(LIKE_SOMETHING_ELSE) | st.text(readable, max_size=8)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(texts, below, max_size=3),
    max_leaves=6,
)


@given(config=st.dictionaries(texts, values, max_size=4))
@example({text: text for text in LIKE_SOMETHING_ELSE})
@example({"a": [[], {}, [{}], {"b": []}], "b": "x" * 300, "c": "word " * 100})
def test_every_value_keeps_its_type(config):
    found = OmegaConf.to_container(parse_config(format_config(config)))
    assert found == config
    assert repr(found) == repr(config)  # 1 is not 1.0, and not True


def test_a_part_that_comes_twice_is_written_twice():
    part = {"a": [1, 2]}
    assert OmegaConf.to_container(parse_config(format_config({"x": part, "y": part}))) == {"x": part, "y": part}


def test_not_a_number_stays_one():
    assert math.isnan(parse_config(format_config({"x": math.nan})).x)


def test_the_shipped_config_reads_as_a_person_would_write_it():
    text = format_config({"optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001}, "name": None, "watch": ["a/b"]})
    assert text == "optimizer:\n  _target_: torch.optim.AdamW\n  lr: 0.001\nname: null\nwatch:\n- a/b\n"
    config = OmegaConf.to_container(compose_config([]), resolve=True)
    assert OmegaConf.to_container(parse_config(format_config(config))) == config
