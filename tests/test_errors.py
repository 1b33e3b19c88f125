import pickle

import pytest

from ksuit_runner.errors import ConfigError, LossError, afterwards, did_you_mean, named_type, suggest

MANY = [f"a{index}" for index in range(50)]


def test_the_nearest_valid_name_is_suggested():
    assert suggest("decya", ["decay", "every"]) == "decay"
    assert suggest("xyz", ["decay", "every"]) is None


def test_a_hint_lists_the_valid_names_where_none_is_near_unless_they_are_too_many():
    assert did_you_mean("decya", ["decay", "every"]) == "Did you mean 'decay'?"
    assert did_you_mean("xyz", ["decay", "every"]) == "Valid: decay, every."
    assert did_you_mean("xyz", []) == "There are none."
    assert did_you_mean("xyz", MANY, longest=49) == ""


def test_of_many_names_a_hint_lists_a_few():
    assert did_you_mean("xyz", MANY) == "Valid: a0, a1, a10, a11, a12, a13, and 44 more."
    names = [*(f"loss{index}" for index in range(50)), "accuracy", "online_accuracy", "f1"]
    assert did_you_mean("acc", names) == "Similar: accuracy, online_accuracy."


def test_what_follows_a_block_is_done_whatever_fails_and_hides_no_earlier_error():
    done = []

    def fail(error):
        done.append(error)
        raise error

    with (
        pytest.raises(ZeroDivisionError) as first,
        afterwards(lambda: fail(OSError("full")), lambda: done.append("last")),
    ):
        raise ZeroDivisionError
    assert (len(done), done[-1]) == (2, "last")
    assert first.value.__notes__ == ["and afterwards: OSError('full')"]
    with pytest.raises(OSError, match="full"), afterwards(lambda: fail(OSError("full")), lambda: fail(KeyError(1))):
        pass
    assert len(done) == 4


def test_an_error_names_the_most_precise_config_path_that_was_known_also_after_pickling():
    inner, outer = ConfigError("it must be positive", path="trainer.clip_norm"), LossError("model weights are missing")
    inner.locate("trainer")
    for path in ("callbacks.mine", "callbacks"):
        outer.locate(path)
    assert str(inner) == "trainer.clip_norm: it must be positive"
    assert str(outer) == "callbacks.mine: model weights are missing" and outer.path == "callbacks.mine"
    copied = pickle.loads(pickle.dumps(outer))
    assert (type(copied), str(copied), copied.path) == (LossError, str(outer), outer.path)


@pytest.mark.parametrize(("value", "text"), [(3, "an int"), (None, "None"), ("a", "a str"), ({}, "a dict")])
def test_a_type_has_its_article(value, text):
    assert named_type(value) == text
