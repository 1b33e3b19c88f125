import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from ksuit_runner.tracker.mlflow_names import LONGEST, escape, escape_short, metric_key, metric_name, unescape

NAMES = st.text(max_size=30) | st.text("ab:/.40@3 ", max_size=12)


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("recall@5 (macro)", "recall:40:5 :28:macro:29:"),
        ("loss: mean", "loss: mean"),
        ("a:40:", "a:3a:40:"),
        (":ab@", ":3a:ab:40:"),
        ("a//b", "a:2f::2f:b"),
        ("../a/.", ":2e:./a/:2e:"),
        ("größe/测试", "größe/测试"),
    ],
)
def test_what_mlflow_refuses_is_escaped(name, escaped):
    assert escape(name) == escaped
    assert unescape(escaped) == name


@given(NAMES.filter(bool))
def test_any_name_is_taken_and_read_back(name):
    _validate_metric_name(escape(name))
    assert unescape(escape(name)) == name
    _validate_metric_name(metric_name(name))
    assert metric_key(metric_name(name)) == name
    assert metric_name(name).count("/") <= 1


@given(st.text(min_size=LONGEST))
def test_long_names_are_cut_and_stay_apart(name):
    _validate_metric_name(escape_short(name))
    assert escape_short(name) != escape_short(name + "a")


@pytest.mark.parametrize("name", ["a:ffffff:b", "a:b", ":", "::"])
def test_what_was_not_escaped_stays(name):
    assert unescape(name) == name
