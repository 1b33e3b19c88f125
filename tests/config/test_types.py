import numpy as np
import pytest

from ksuit_runner.config.types import check_numbers
from ksuit_runner.errors import ConfigError


def test_numbers_of_their_type_pass_also_those_of_numpy_lists_and_none():
    check_numbers("PositiveInt", a=1, b=np.int64(7), c=[1, 2], d=(), e=None)
    check_numbers("NonNegativeFloat", "trainer", a=0, b=0.5, c=np.float32(2.0))


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("PositiveInt", 0),
        ("PositiveInt", 1.0),
        ("PositiveInt", True),
        ("PositiveInt", [1, 0]),
        ("NonNegativeInt", -1),
        ("TwoOrMore", 1),
        ("PositiveFloat", 0),
        ("NonNegativeFloat", float("nan")),
        ("AboveOne", 1),
        ("FractionUpToOne", 1.01),
        ("FractionBelowOne", 1),
        ("OpenFraction", "0.5"),
    ],
)
def test_another_one_is_refused_by_its_name(kind, number):
    with pytest.raises(ConfigError, match=r"^size: a (whole )?number .* is needed, not "):
        check_numbers(kind, fine=None, size=number)


def test_an_error_says_what_is_needed_and_has_the_config_path_that_is_known():
    with pytest.raises(ConfigError) as raised:
        check_numbers("TwoOrMore", "data", folds=[5, 1])
    assert (raised.value.path, str(raised.value)) == (
        "data.folds",
        "data.folds: a whole number of at least 2 is needed, not 1",
    )
