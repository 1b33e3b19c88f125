import pytest

from ksuit_runner.config.differences import ABSENT, Difference
from ksuit_runner.errors import ResumeError
from ksuit_runner.resume.changes import _may_change, _refuse_rewriting


@pytest.mark.parametrize(
    ("old", "new", "may_change"),
    [
        ("cuda:0", "cuda:1", True),
        ("cuda", "cuda:1", True),
        ("auto", "cuda:1", True),
        (ABSENT, "cpu", True),
        ("cuda:0", "cpu", False),
        ("mps", "cuda", False),
    ],
)
def test_a_run_may_be_resumed_on_another_device_of_its_kind(old, new, may_change):
    assert _may_change(Difference("trainer.device", old, new)) is may_change


def test_activations_may_be_checkpointed_from_now_on_unless_code_is_compiled():
    changes = [Difference("trainer.activation_checkpointing", None, ["blocks.{}"])]
    _refuse_rewriting(changes, "run00000", [], is_compiled=False)
    with pytest.raises(ResumeError, match="would rewrite the past of run run00000"):
        _refuse_rewriting(changes, "run00000", [], is_compiled=True)


@pytest.mark.parametrize(
    ("path", "old", "new", "may_change"),
    [
        ("strategy.bucket_mb", 25, 50, True),
        ("strategy.sync_batchnorm", ABSENT, False, True),
        ("strategy.sync_batchnorm", False, True, False),
        ("strategy.sync_batchnorm", True, ABSENT, False),
        ("strategy", ABSENT, {"_target_": "mine.Strategy"}, True),
        ("strategy", ABSENT, {"_target_": "mine.Strategy", "sync_batchnorm": True}, False),
    ],
)
def test_a_strategy_may_change_unless_the_results_do(path, old, new, may_change):
    assert _may_change(Difference(path, old, new)) is may_change
