"""Values as overrides have them: whatever a YAML file says arrives as it is, with its type."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ksuit_runner.config.overrides import parse, to_text
from ksuit_runner.errors import ConfigError

TEXTS = r"""
    1.10 null Null true FALSE 1e3 -1 +1 .5 1. 1_000 0x1 inf NaN - + / . .. ~ ~x ' '' " \ \\ \' a\ ${ ${a.b} \${a} ???
    [a {a:1 a,b a=b größe 日本 a#b a;b a%b a@b choice(1,2) (x) x: 007 3layers my-run_2 /data/a.b
"""
texts = st.sampled_from([*TEXTS.split(), "", " ", " a b ", "a b", "\n", "\t", 'it\'s "x" \\']) | st.text(max_size=8)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers(), inner), max_leaves=6
)


def typed(value):
    """Return a value with its types, in a form in which NaN is equal to itself."""
    if isinstance(value, dict):
        return {repr(key): typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return type(value), repr(value)


@given(values)
@example({"a key": {"a,b": ["1", 1, "x y"], "a(1)": "[", "\\": None}})
def test_hydra_reads_back_the_very_value(value):
    try:
        text = to_text(value)
    except ConfigError as error:
        assert "cannot be written in an override" in str(error)
        assert not isinstance(value, str | list) or "{" in repr(value)
    else:
        assert typed(parse(f"key={text}").value()) == typed(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("cnn", "cnn"),
        ("mnist1d_cnn", "mnist1d_cnn"),
        ("/data/a-b/c.yaml", "/data/a-b/c.yaml"),
        ("3layers", "3layers"),
        (["ema", "accuracy"], "[ema,accuracy]"),
        ({"max_epochs": 3}, "{max_epochs:3}"),
        (1e-05, "1e-05"),
    ],
)
def test_what_needs_no_quotes_has_none(value, text):
    assert to_text(value) == text


@pytest.mark.parametrize("key", ["1", "null", "größe", "it's", ""])
def test_a_key_that_no_override_can_have_is_refused_and_not_changed(key):
    with pytest.raises(ConfigError, match="cannot be written in an override. Put the mapping into a YAML file"):
        to_text({key: 1})


def test_a_value_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="a bytes cannot be a value of an override"):
        to_text(b"x")


@pytest.mark.parametrize("text", ["key=ö", "key=[", "key=" + "[" * 3000, "key=" + "1" * 5000, "key"])
def test_what_is_no_override_is_a_mistake_of_one_short_line(text):
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert len(str(raised.value)) < 450 and len(str(raised.value).splitlines()) == 1
