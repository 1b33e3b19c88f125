import io
import logging
import re
from functools import partial

import pytest
from rich.console import Console

from callbacks.accuracy import Accuracy
from callbacks.learning_rate import LearningRate
from callbacks.progress import Progress
from callbacks.train_loss import TrainLoss
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.engine.loop import evaluate
from ksuit_runner.errors import ConfigError
from ksuit_runner.ui.logs import setup_logging

NEVER = 1e6  # seconds
ALWAYS = 1e-9
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Fails(CallbackBase):
    """Raises an error at the third update."""

    def _after_update(self, update_counter):
        if update_counter.update == 3:
            raise RuntimeError("the third update")


class Remarks(CallbackBase):
    """Writes a line to the log."""

    def _after_epoch(self, update_counter):
        self.logger.info("a remark")


def console(is_terminal):
    environment = {"TERM": "xterm-256color"}
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=200, height=50, _environ=environment)


def lines_of(new_run, callbacks, seconds=NEVER, go=lambda run: run.train(), **arguments):
    target = console(is_terminal=False)
    with setup_logging(None, target):
        go(new_run({"progress": partial(Progress, every_n_seconds=seconds), **callbacks}, **arguments))
    return target.file.getvalue().splitlines()


def test_plain_lines_come_after_evaluations_and_at_the_end(new_run):
    callbacks = {
        "loss": partial(TrainLoss, every_n_updates=5),
        "rate": partial(LearningRate, every_n_updates=5),
        "accuracy": partial(Accuracy, dataset_key="test", every_n_updates=20),
    }
    lines = lines_of(new_run, callbacks, max_updates=50)
    number = r"\d[\d.]*"
    assert len(lines) == 3
    for line, epoch, update in zip(lines, (1, 2, 3), (20, 40, 50), strict=True):
        left = "" if update == 50 else r"  \d+s left"
        metrics = f"loss/train {number}  accuracy/test {number}"
        assert re.fullmatch(f"epoch {epoch}/3  update {update}/50  {number} updates/s{left}  {metrics}", line), line


def test_an_evaluation_at_the_last_update_needs_no_second_line(new_run):
    lines = lines_of(new_run, {"accuracy": partial(Accuracy, dataset_key="test", every_n_epochs=1)}, max_epochs=2)
    assert [line.split("  ")[:2] for line in lines] == [["epoch 1/2", "update 20/40"], ["epoch 2/2", "update 40/40"]]


class Late(CallbackBase):
    """Logs once more after training, as an evaluation of the test set does."""

    def _after_training(self, update_counter):
        self.writer.add_scalar("accuracy/late", 0.5)


def test_what_comes_at_the_end_is_not_shown_with_what_was_shown_before(new_run):
    callbacks = {"accuracy": partial(Accuracy, dataset_key="test", every_n_epochs=1), "late": Late}
    first, second = lines_of(new_run, callbacks, max_epochs=1)
    assert "accuracy/test" in first and "accuracy/late" not in first
    assert "update 20/20" in second and second.endswith("  accuracy/late 0.5") and "accuracy/test" not in second


def test_there_are_lines_in_between_when_time_has_passed(new_run):
    lines = lines_of(new_run, {}, seconds=ALWAYS, max_updates=4)
    assert [line.split("  ")[1] for line in lines] == ["update 1/4", "update 2/4", "update 3/4", "update 4/4"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_each_epoch_gets_a_line_with_what_is_logged_at_its_end(new_run, is_terminal):
    target = console(is_terminal)
    callbacks = {
        "progress": partial(Progress, every_n_seconds=NEVER, refresh_seconds=NEVER, line_per_epoch=True),
        "accuracy": partial(Accuracy, dataset_key="test", every_n_epochs=2),
    }
    with setup_logging(None, target):
        new_run(callbacks, max_epochs=3).train()
    lines = re.findall(r"epoch \d/3  update .*", target.file.getvalue())
    found = [re.fullmatch(r"epoch (\d)/3  update (\d+)/60 .*?(accuracy/test .*)?", line).groups() for line in lines]
    assert [(epoch, update) for epoch, update, _ in found] == [("1", "20"), ("2", "40"), ("3", "60")]
    assert [bool(metrics) for *_, metrics in found] == [False, True, True]


def test_an_evaluation_says_where_it_is(new_run):
    callbacks = {
        "accuracy": partial(Accuracy, dataset_key="test", every_n_updates=10),
        "again": partial(Accuracy, dataset_key="test", every_n_updates=10),
    }
    lines = lines_of(new_run, callbacks, seconds=ALWAYS, max_updates=10)
    number = len([line for line in lines if re.fullmatch(r"accuracy, again on test \d+/\d+", line)])
    assert f"accuracy, again on test {number}/{number}" in lines


def test_of_many_metrics_the_first_ones_are_shown(new_run):
    class Many(CallbackBase):
        def _after_update(self, update_counter):
            for number in range(100):
                self.writer.add_scalar(f"accuracy/{number}", 0.5)

    (line,) = lines_of(new_run, {"many": Many}, max_updates=1)
    assert "accuracy/11 0.5  and 88 more" in line and "accuracy/12" not in line


def test_a_resumed_run_counts_on(new_run):
    lines_of(new_run, {}, stop_at=7, max_updates=10)
    lines = lines_of(new_run, {}, seconds=ALWAYS, max_updates=10)
    assert [line.split("  ")[1] for line in lines] == ["update 8/10", "update 9/10", "update 10/10"]


def test_an_evaluation_alone_has_its_values_shown(new_run):
    callbacks = {"accuracy": partial(Accuracy, dataset_key="test", every_n_epochs=1)}
    lines = lines_of(new_run, callbacks, go=lambda run: evaluate(run.run), max_updates=10)
    assert len(lines) == 1
    assert re.fullmatch(r"epoch 1/1  update 0/10  accuracy/test 0\.\d+", lines[0])


def test_a_terminal_shows_a_bar_and_the_log_above_it(new_run):
    target = console(is_terminal=True)
    callbacks = {
        "progress": partial(Progress, refresh_seconds=ALWAYS),
        "accuracy": partial(Accuracy, dataset_key="test", every_n_updates=10),
        "remarks": Remarks,
    }
    with setup_logging(None, target):
        new_run(callbacks, max_epochs=1).train()
    output = target.file.getvalue()
    assert output.count(HIDE_CURSOR) == output.count(SHOW_CURSOR) == 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert all(re.search(f" {n}/20 .* 0:00:0", plain) for n in range(21))
    assert re.search(r"a remark\nepoch 1/1 ━+ 20/20 ", plain)
    assert re.search(r"accuracy/test 0\.\d+\s*$", plain)
    assert re.search(r"^accuracy on test 1/\d+\s*$", plain, re.MULTILINE)


@pytest.mark.parametrize("how", ["error", "interruption"])
def test_a_bar_is_closed_however_the_run_ends(new_run, how):
    target = console(is_terminal=True)
    callbacks = {"progress": Progress, **({"fails": Fails} if how == "error" else {})}
    with setup_logging(None, target):
        run = new_run(callbacks, stop_at=4, max_updates=10)
        if how == "error":
            with pytest.raises(RuntimeError, match="the third update"):
                run.train()
        else:
            assert run.train().run.counter.update == 4
    output = target.file.getvalue()
    assert output.count(HIDE_CURSOR) == output.count(SHOW_CURSOR) == 1


def test_without_a_log_on_a_console_it_still_runs(new_run, caplog):
    with caplog.at_level(logging.INFO, "ksuit_runner"):
        new_run({"progress": Progress}, max_updates=2).train()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("epoch 1/1  update 2/2")


@pytest.mark.parametrize("name", ["every_n_seconds", "refresh_seconds"])
def test_times_have_to_be_positive(new_run, name):
    with pytest.raises(ConfigError, match=name):
        new_run({"progress": partial(Progress, **{name: 0})})
