import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksuit_runner.counter import Interval, Progress, UpdateCounter
from ksuit_runner.errors import ConfigError


def walk(counter):
    """Do all updates of a run and yield after each."""
    while not counter.is_finished:
        counter.update += 1
        yield counter


def test_progress_is_read_back_from_its_text():
    assert str(Progress(2, 90, 2880)) == "E2_U90_S2880"
    assert Progress.parse("E2_U90_S2880") == Progress(2, 90, 2880)


@pytest.mark.parametrize("text", ["latest", "E2_U90", ".E2_U90_S2880.tmp", "E2_U90_S2880x", "E-1_U9_S9"])
def test_other_names_are_no_progress(text):
    assert Progress.parse(text) is None


def test_epochs_and_samples_follow_from_updates():
    counter = UpdateCounter(10, 3, max_epochs=2)
    assert [str(item.progress) for item in walk(counter)] == [
        "E0_U1_S3", "E0_U2_S6", "E1_U3_S9", "E1_U4_S12", "E1_U5_S15", "E2_U6_S18",
    ]  # fmt: skip


def test_a_smaller_last_batch_counts_with_its_own_size():
    counter = UpdateCounter(10, 3, drop_last=False, max_epochs=2)
    samples = [item.sample for item in walk(counter)]
    assert samples == [3, 6, 9, 10, 13, 16, 19, 20]


@pytest.mark.parametrize(
    ("ends", "updates"),
    [
        ({"max_epochs": 3}, 9),
        ({"max_updates": 4}, 4),
        ({"max_samples": 9}, 3),
        ({"max_samples": 10}, 4),
        ({"max_epochs": 3, "max_updates": 4}, 4),
        ({"max_epochs": 1, "max_updates": 4, "max_samples": 100}, 3),
        ({"max_updates": 0}, 0),
    ],
)
def test_the_first_end_counts(ends, updates):
    assert len(list(walk(UpdateCounter(10, 3, **ends)))) == updates


@given(size=st.integers(1, 60), batch=st.integers(1, 20), drop_last=st.booleans(), max_samples=st.integers(1, 200))
def test_max_samples_ends_with_the_first_update_that_reaches_it(size, batch, drop_last, max_samples):
    if size < batch and drop_last:
        return
    counter = UpdateCounter(size, batch, drop_last, max_samples=max_samples)
    samples = [0, *(item.sample for item in walk(counter))]
    assert samples[-1] >= max_samples > samples[-2]


def test_an_end_is_needed():
    with pytest.raises(ConfigError, match="max_epochs, max_updates, max_samples"):
        UpdateCounter(10, 3)


@pytest.mark.parametrize("end", ["max_epochs", "max_updates", "max_samples"])
def test_an_end_is_not_negative(end):
    with pytest.raises(ConfigError, match=rf"trainer.{end}: .* -1"):
        UpdateCounter(10, 3, **{end: -1})


def test_the_data_has_to_fill_a_batch():
    with pytest.raises(ConfigError, match="11 is more than the 10 training samples"):
        UpdateCounter(10, 11, max_epochs=1)
    assert UpdateCounter(10, 11, drop_last=False, max_epochs=1).end_update == 1


def test_looking_ahead_moves_nothing():
    counter = UpdateCounter(10, 3, max_epochs=2)
    assert counter.at(3).is_full_epoch
    assert counter.update == 0


def test_a_position_is_stored_and_taken_up():
    counter = UpdateCounter(10, 3, max_epochs=2)
    counter.update, counter.stopped = 4, True
    other = UpdateCounter(10, 3, max_epochs=5)
    other.load_state_dict(counter.state_dict())
    assert other.progress == counter.progress
    assert other.stopped and other.is_finished


def test_a_position_of_other_data_is_refused():
    counter = UpdateCounter(10, 3, max_epochs=2)
    counter.update = 4
    with pytest.raises(ConfigError, match="update 4 was at sample 12 and would now be at 16"):
        UpdateCounter(10, 4, max_epochs=5).load_state_dict(counter.state_dict())


@pytest.mark.parametrize(
    ("interval", "due"),
    [
        ({"every_n_updates": 2}, [2, 4, 6]),
        ({"every_n_epochs": 1}, [3, 6]),
        ({"every_n_epochs": 2}, [6]),
        ({"every_n_samples": 5}, [2, 4, 5]),
        ({"every_n_samples": 1}, [1, 2, 3, 4, 5, 6]),
        ({"every_n_samples": 9}, [3, 6]),
        ({"every_n_updates": 4, "every_n_epochs": 1}, [3, 4, 6]),
        ({"every_n_updates": 2, "every_n_samples": 9, "at_start": True}, [2, 3, 4, 6]),
        ({"every_n_updates": 5, "at_end": True}, [5, 6]),
    ],
)
def test_what_is_due_when(interval, due):
    counter = UpdateCounter(10, 3, max_epochs=2)
    assert [item.update for item in walk(counter) if Interval(**interval).is_due(item)] == due
    following = {at: next((update for update in due if update > at), None) for at in range(6)}
    for at, update in following.items():
        found = Interval(**interval).next_due(counter.at(at))
        assert found == update or (update is None and (found is None or found > 6))


def test_what_is_due_next_in_epochs_with_a_smaller_last_batch():
    for n in range(1, 24):
        counter = UpdateCounter(10, 4, drop_last=False, max_epochs=50)
        interval = Interval(every_n_samples=n)
        due = [item.update for item in walk(counter) if interval.is_due(item)]
        assert [interval.next_due(counter.at(update)) for update in (0, *due[:-1])] == due


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "is needed, not none"),
        ({"every_n_epochs": 1, "every_n_updates": 0}, "every_n_updates: a whole number of at least 1 is needed, not 0"),
        ({"every_n_updates": 0}, "every_n_updates: a whole number of at least 1 is needed, not 0"),
        ({"every_n_updates": 1.5}, "not 1.5"),
        ({"every_n_updates": True}, "not True"),
    ],
)
def test_the_numbers_of_an_interval_are_positive_and_whole(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Interval(**arguments)


def test_the_start_is_due_before_the_first_update_and_nothing_else():
    counter = UpdateCounter(10, 3, max_epochs=2)
    assert Interval(at_start=True).is_due(counter)
    assert not Interval(every_n_updates=1, every_n_epochs=1, every_n_samples=1, at_end=True).is_due(counter)


@pytest.mark.parametrize(
    ("one", "other", "update"),
    [
        ({"every_n_updates": 4}, {"every_n_epochs": 2}, 12),
        ({"every_n_updates": 4, "every_n_epochs": 3}, {"every_n_epochs": 1}, 9),
        ({"every_n_updates": 7, "at_end": True}, {"every_n_updates": 5}, 20),
        ({"every_n_updates": 7, "at_start": True}, {"at_start": True}, 0),
        ({"at_start": True}, {"at_end": True}, None),
        ({"every_n_samples": 12}, {"every_n_updates": 5}, 20),
    ],
)
def test_intervals_meet_where_both_are_due(one, other, update):
    counter = UpdateCounter(10, 3, max_updates=20)
    assert Interval(**one).meets(Interval(**other), counter) == update
