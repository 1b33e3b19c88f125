from math import inf, nan

import pytest

from ksuit_runner.errors import ConfigError
from ksuit_runner.metric_property import MetricPropertyProvider


@pytest.mark.parametrize(
    ("key", "direction"),
    [
        ("accuracy/test", "higher"),
        ("accuracy_top5/test/ema", "higher"),
        ("loss/train", "lower"),
        ("learning_rate", "neutral"),
        ("Accuracy/test", "higher"),
        ("error_rate/test", "lower"),
        ("lossdiff/train", "neutral"),
        ("loss_weight/kl", "neutral"),
        ("f1/validation/ema", "higher"),
        ("eval/f1/test", "higher"),
        ("online_f1/train", "higher"),
        ("mean_iou/test", "higher"),
        ("iou_3/test", "higher"),
        ("memory/bf16", "neutral"),
        ("previous/norm", "neutral"),
        ("auroc/test", "higher"),
        ("r2_score/test", "higher"),
        ("calibration_error/test", "lower"),
        ("root_mean_squared_error/test", "lower"),
        ("perplexity/test", "lower"),
        ("bits_per_character/test", "lower"),
    ],
)
def test_direction_by_default(key, direction):
    assert MetricPropertyProvider().direction(key) == direction


def test_patterns_of_ones_own():
    properties = MetricPropertyProvider(higher=["bleu*", "*score"], lower=["*"], neutral=["bleu/train", "lr"])
    keys = ("bleu/test", "bleu/train", "f1score", "perplexity", "lr")
    assert [properties.direction(key) for key in keys] == ["higher", "neutral", "higher", "lower", "neutral"]


def test_patterns_have_no_case():
    properties = MetricPropertyProvider(higher=["*BLEU*"], lower=["wer"])
    assert [properties.direction(key) for key in ("bleu/test", "sacreBLEU", "WER")] == ["higher", "higher", "lower"]


def test_whether_higher_is_better():
    properties = MetricPropertyProvider()
    assert properties.higher_is_better("accuracy/test") is True
    assert properties.higher_is_better("loss/test") is False
    with pytest.raises(ConfigError, match="neither higher nor lower values of 'learning_rate' are better"):
        properties.higher_is_better("learning_rate")


@pytest.mark.parametrize(
    ("key", "value", "than", "is_better"),
    [
        ("accuracy", 0.5, None, True),
        ("accuracy", 0.6, 0.5, True),
        ("accuracy", 0.5, 0.5, False),
        ("accuracy", 0.4, 0.5, False),
        ("loss", 0.4, 0.5, True),
        ("loss", 0.5, 0.5, False),
        ("loss", 0.6, 0.5, False),
        ("loss", 0.6, inf, True),
        ("loss", nan, None, False),
        ("loss", nan, 0.5, False),
        ("loss", 0.5, nan, True),
        ("seconds", 9.0, 1.0, True),
        ("seconds", 1.0, 9.0, True),
    ],
)
def test_is_better(key, value, than, is_better):
    assert MetricPropertyProvider().is_better(key, value, than) is is_better
