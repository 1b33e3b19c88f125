import pytest

from ksuit_runner.config.schema import INJECTED, OBJECT_SPECS, TargetParameter, bind, spec_at
from ksuit_runner.errors import ConfigError

PARAMETERS = [
    TargetParameter("model"),
    TargetParameter("decay", "float"),
    TargetParameter("every", "int", required=False, default=1),
]


def test_bind_returns_what_the_runner_provides_and_is_asked_for():
    assert bind("callbacks.ema", PARAMETERS, ["decay"], {"model", "tracker"}) == ["model"]


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError) as error:
        bind("callbacks.ema", PARAMETERS, ["decya"], {"model"})
    assert str(error.value) == "callbacks.ema.decya: there is no such argument. Did you mean 'decay'?"


def test_an_unknown_name_is_not_pointed_to_one_that_the_runner_provides():
    with pytest.raises(ConfigError) as error:
        bind("callbacks.ema", PARAMETERS, ["modell"], {"model"})
    assert str(error.value) == "callbacks.ema.modell: there is no such argument. Valid: decay, every."


def test_any_name_passes_where_the_constructor_takes_any():
    assert bind("x", PARAMETERS, ["decay", "whatever"], {"model"}, any_name=True) == ["model"]


def test_a_missing_name():
    with pytest.raises(ConfigError) as error:
        bind("callbacks.ema", PARAMETERS, [], {"model"})
    assert str(error.value) == "callbacks.ema.decay: a value is needed"


@pytest.mark.parametrize("name", ["model", "tracker"])
def test_a_name_that_the_runner_provides_may_not_be_given(name):
    with pytest.raises(ConfigError) as error:
        bind("callbacks.ema", PARAMETERS, ["decay", name], {"model", "tracker"}, any_name=True)
    assert str(error.value) == f"callbacks.ema.{name}: '{name}' is provided by the runner; remove it"


def test_every_spec_says_what_is_injected():
    assert {spec.injects for spec in OBJECT_SPECS.values()} <= set(INJECTED)


def test_spec_at():
    assert spec_at("model") is OBJECT_SPECS["model"]
    assert spec_at("callbacks.ema") is OBJECT_SPECS["callbacks.*"]
    assert spec_at("data.datasets.train") is OBJECT_SPECS["data.datasets.*"]
    assert spec_at("data.datasets") is None
    assert spec_at("callbacks.ema.decay") is None
