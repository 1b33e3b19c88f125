"""Mistakes that Hydra's own words would mislead about: what is said, and that it is not misleading."""

import pytest

from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config, without_sweep
from ksuit_runner.errors import ConfigError

RULE = "trainer.parameter_rules={head: {match: ['head*']}}"
INLINE = "model={_target_: torch.nn.Linear, in_features: 64}"


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "conf" / "experiment" / "vision").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "vision" / "small.yaml").write_text("# @package _global_\nseed: 1\n")
    (tmp_path / "conf" / "callbacks").mkdir()
    (tmp_path / "conf" / "callbacks" / "dotted.yaml").write_text("acc.v1:\n  _target_: callbacks.accuracy.Accuracy\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "first", "second"),
    [
        ([RULE], "'trainer.parameter_rules' has no 'head'. Valid: no_decay.", f"To add a new key, write +{RULE}"),
        ([INLINE], "'model' has no 'in_features'", "write a file in conf/model/ and choose it"),
        (
            ["model=mlp", "model.hiden=3"],
            "model.hiden=3: 'model' has no 'hiden'. Did you mean 'hidden_dims'?",
            "+model.hiden",
        ),
        (["optimizer.lr.x=3"], "optimizer.lr.x=3: 'optimizer.lr' is a value and has no keys", ""),
        (
            ["experiment=vision/smal"],
            "experiment/vision: there is no 'smal'. Did you mean 'small'?",
            "There are: small",
        ),
        (["experiment=vison/small"], "there is no group 'experiment/vison'", ""),
    ],
)
def test_what_is_missing_is_named_where_it_is_missing(project, overrides, first, second):
    with pytest.raises(ConfigError) as raised:
        compose_config(overrides)
    lines = [*str(raised.value).splitlines(), ""]
    assert first in lines[0] and second in lines[1]


def test_a_nested_file_is_composed(project):
    assert compose_config(["experiment=vision/small"]).seed == 1


def test_a_name_with_a_dot_is_refused_for_its_dot(project):
    with pytest.raises(ConfigError, match=r"^callbacks: the name 'acc.v1' has a dot, which separates the parts of a"):
        check_config(without_sweep(compose_config(["callbacks=[dotted]"])))
