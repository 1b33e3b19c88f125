import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksuit_runner.config.check.annotation import fits, mentions
from ksuit_runner.config.check.mismatch import mismatch

FITTING = [
    (3, "int"),
    (3, "float"),
    (3.5, "float"),
    ("a", "str"),
    (True, "bool"),
    (None, "None"),
    (None, "int | None"),
    (1, "PositiveInt | None"),
    (0, "NonNegativeInt"),
    (2, "TwoOrMore"),
    (1e-9, "PositiveFloat"),
    (3, "PositiveFloat"),
    (0, "NonNegativeFloat | str"),
    (1.1, "AboveOne"),
    (1, "FractionUpToOne"),
    (0.0, "FractionBelowOne"),
    ([0.5, 0.9], "Sequence[OpenFraction]"),
    (12, "int | FractionUpToOne | None"),
    (None, "Optional[int]"),
    (3, "typing.Union[str, int]"),
    ("a", "Literal['a', 'b']"),
    (None, "Literal['a', None]"),
    ([1, 2], "Sequence[int]"),
    ([], "list[str]"),
    ([1, 2], "set[int]"),
    ([1, "a"], "tuple[int, str]"),
    ([1, 2, 3], "tuple[int, ...]"),
    ([], "tuple[()]"),
    ([], "tuple"),
    ({"a": 1}, "Mapping[str, int]"),
    ({"a": [1]}, "dict[str, list[int]]"),
    ({"a": 1}, "collections.abc.Mapping"),
    ([[1], None], "Sequence[Sequence[int] | None]"),
    ("some/file", "str | Path"),
    ("test", "DatasetKey"),
    ("accuracy/test", "MetricKey | None"),
    (3, "Annotated[int, 'a note']"),
    ("abc", "'str | None'"),
    (3, "list['int'] | int"),
    (object, "int"),  # not from YAML: not judged
    (3, "Any"),
    (3, "SomethingElse"),
    ("a", "SomethingElse | int"),
    (3, "Literal[SOME.CONSTANT]"),
    (3, "not an ( annotation"),
    ({"_target_": "a.B"}, "nn.Module"),
    ({"_target_": "a.B"}, "Callable[..., Optimizer]"),
    ([{"_target_": "a.B"}], "Sequence[Callable[[int], int]]"),
    ({"_target_": "a.B"}, "int"),
]

NOT_FITTING = [
    (0, "PositiveInt | None"),
    (-1, "Sequence[PositiveInt] | PositiveInt"),
    (True, "PositiveInt"),
    (-1, "NonNegativeInt"),
    (1, "TwoOrMore"),
    (2.0, "TwoOrMore"),
    (0, "PositiveFloat | None"),
    (float("nan"), "PositiveFloat"),
    (True, "PositiveFloat"),
    ("1", "PositiveFloat"),
    (-0.1, "NonNegativeFloat"),
    (1, "AboveOne"),
    (1.5, "FractionUpToOne"),
    (1, "FractionBelowOne"),
    ([0.5, 1.0], "Sequence[OpenFraction]"),
    (1.5, "int | FractionUpToOne | None"),
    (True, "int"),
    (True, "float"),
    (1, "bool"),
    (1.0, "int"),
    ("1e-3", "float"),
    ("abc", "int | None"),
    ("abc", "Optional[int]"),
    (None, "int"),
    (3, "str"),
    ("c", "Literal['a', 'b']"),
    (True, "Literal[1]"),
    ("abc", "Sequence[str]"),
    (["a"], "Sequence[int]"),
    ([1], "tuple[int, int]"),
    ([1], "tuple[()]"),
    ([1, "a"], "tuple[int, ...]"),
    ([1], "Mapping[str, int]"),
    ({"a": "b"}, "dict[str, int]"),
    ({1: 1}, "dict[str, int]"),
    ("abc", "float | Tensor"),
    ("abc", "torch.nn.Module"),
    ({"a": 1}, "Callable[[int], int]"),
    (1, "DatasetKey"),
    ("abc", "'int'"),
]


@pytest.mark.parametrize(("value", "annotation"), FITTING)
def test_fits(value, annotation):
    assert fits(value, annotation)
    assert mismatch(value, annotation) is None


@pytest.mark.parametrize(("value", "annotation"), NOT_FITTING)
def test_does_not_fit(value, annotation):
    assert not fits(value, annotation)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("abc", "int | None", "a whole number, or null, got 'abc'"),
        (0, "PositiveInt | None", "a whole number of at least 1, or null, got 0"),
        (1.5, "OpenFraction", "a number between 0 and 1, got 1.5"),
        ([0], "Sequence[PositiveFloat]", "a list of numbers above 0, got [0]"),
        (90, "Duration | None", "a duration such as 90m or 1d 12h, or null, got 90"),
        (True, "NonNegativeInt", "a whole number of at least 0, got true"),
        (None, "MetricKey", "the key of a logged metric, such as accuracy/validation, got null"),
        (1, "Sequence[DatasetKey] | str", "a list of keys of data.datasets, such as test, or a text, got 1"),
        ("half", "Literal['float32', 'float16']", "'float32', or 'float16', got 'half'"),
        ("abc", "float | Tensor", "a number, got 'abc'"),
        ("abc", "Tensor | None", "an object with a _target_, a Tensor, or null, got 'abc'"),
        ("abc", "torch.nn.Module", "an object with a _target_, a Module, got 'abc'"),
        ("abc", "Callable[[int], int] | None", "an object with a _target_ that can be called, or null, got 'abc'"),
        ("abc", "Sequence[Callable[..., Any]]", "a list of objects with a _target_ that can be called, got 'abc'"),
        ([1], "tuple[int, int]", "a list of 2 whole numbers, got [1]"),
        ([1, "a"], "tuple[float, ...]", "a list of numbers, got [1, 'a']"),
        ([1], "tuple[str, int | None]", "a list of a text and a whole number, or null, got [1]"),
        ([1], "tuple[()]", "a list of nothing, got [1]"),
        ("a", "tuple | bool", "a list, or true or false, got 'a'"),
        ("a", "Literal['b', None, True]", "'b', null, or true, got 'a'"),
        ("abc", "'Mapping[str, list[int]]'", "a mapping from texts to lists of whole numbers, got 'abc'"),
        ("abc", "Optional[typing.Union[int, list[Union[int, float]]]]", None),
        ("abc", "int | list[int | float] | None", None),  # the same, whatever a library's version writes
    ],
)
def test_the_message_says_in_words_what_is_expected(value, annotation, message):
    message = message or "a whole number, a list of whole numbers, or numbers, or null, got 'abc'"
    assert mismatch(value, annotation) == f"expects {message}"


def test_the_message_cuts_a_long_value():
    message = mismatch(["x"] * 100, "int")
    assert message is not None and len(message) < 100


def test_mentions_finds_a_name_anywhere():
    assert mentions("Sequence[config_types.DatasetKey] | None", "DatasetKey")
    assert not mentions("Sequence[str]", "DatasetKey")
    assert not mentions(None, "DatasetKey")
    assert not mentions("not an ( annotation", "DatasetKey")


# Pairs of an annotation and a strategy for values that fit it, built from smaller pairs.
SCALARS = st.sampled_from(
    [
        ("int", st.integers()),
        ("float", st.floats() | st.integers()),
        ("str", st.text()),
        ("bool", st.booleans()),
        ("None", st.none()),
        ("Literal['a', 2, None]", st.sampled_from(["a", 2, None])),
    ]
)
PAIRS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda ab: (f"{ab[0][0]} | {ab[1][0]}", ab[0][1] | ab[1][1])),
        st.tuples(inner, inner).map(lambda ab: (f"Union[{ab[0][0]}, {ab[1][0]}]", ab[0][1] | ab[1][1])),
        inner.map(lambda a: (f"Optional[{a[0]}]", st.none() | a[1])),
        inner.map(lambda a: (f"Sequence[{a[0]}]", st.lists(a[1], max_size=3))),
        inner.map(lambda a: (f"tuple[{a[0]}, ...]", st.lists(a[1], max_size=3))),
        st.tuples(inner, inner).map(
            lambda ab: (f"tuple[{ab[0][0]}, {ab[1][0]}]", st.tuples(ab[0][1], ab[1][1]).map(list))
        ),
        inner.map(lambda a: (f"Mapping[str, {a[0]}]", st.dictionaries(st.text(), a[1], max_size=3))),
    ),
    max_leaves=4,
)


@given(st.data())
def test_a_value_made_from_an_annotation_fits_it(data):
    annotation, values = data.draw(PAIRS)
    value = data.draw(values)
    assert fits(value, annotation), (value, annotation)


@given(st.data())
def test_a_value_made_from_an_annotation_fits_it_in_quotes_and_among_others(data):
    annotation, values = data.draw(PAIRS)
    value = data.draw(values)
    assert fits(value, repr(annotation))
    assert fits([value], f"list[{annotation}]")


@given(st.text() | st.booleans() | st.none() | st.lists(st.integers()))
def test_what_is_no_number_fits_no_number(value):
    assert not fits(value, "int | float")
