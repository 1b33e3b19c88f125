import pytest

from ksuit_runner.config.differences import ABSENT, Difference
from ksuit_runner.resume.changes import _may_change


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
