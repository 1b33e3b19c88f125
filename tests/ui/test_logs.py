import logging
import re

import pytest

from ksuit_runner.ui.logs import OF_RANK, run_console, setup_logging


def test_the_log_goes_to_console_and_file_and_is_undone_at_the_end(console, tmp_path):
    logger, child = logging.getLogger("ksuit_runner"), logging.getLogger("ksuit_runner.callbacks.ema")
    root_before = logging.getLogger().handlers[:]
    before = (logger.handlers[:], logger.level, logger.propagate)
    path = tmp_path / "run" / "run.log"
    for number in range(2):
        with setup_logging(path, console) as inner:
            assert inner is logger
            assert not logger.propagate
            child.info("[bold]update %d[/bold] %s", number, "y" * 200)
            child.debug("not shown")
        assert (logger.handlers, logger.level, logger.propagate) == before
    assert logging.getLogger().handlers == root_before
    assert console.file.getvalue().splitlines() == [f"[bold]update {n}[/bold] {'y' * 200}" for n in range(2)]
    pattern = (
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO    ksuit_runner\.callbacks\.ema: \[bold\]update \d\[/bold\] y+"
    )
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_the_log_is_undone_after_an_error_too_and_needs_no_file(console):
    logger = logging.getLogger("ksuit_runner")
    before = logger.handlers[:]
    with pytest.raises(ZeroDivisionError), setup_logging(None, console):
        logger.warning("careful")
        raise ZeroDivisionError
    assert logger.handlers == before
    assert console.file.getvalue() == "careful\n"


def test_what_all_ranks_warn_of_is_logged_by_the_first_one(console, tmp_path):
    path = tmp_path / "run.log"
    for rank in range(3):
        with setup_logging(path, console, rank):
            for name in ("callbacks.gradient_spikes", "trainer.loss_check"):
                logging.getLogger(f"ksuit_runner.{name}").warning("%s: a spike", name)
            logging.getLogger("ksuit_runner.callbacks.nan_watch").warning("of a part", extra=OF_RANK)
            logging.getLogger("ksuit_runner.engine.last_state").warning("a rank is lost")
            logging.getLogger("ksuit_runner.trainer.sgd").error("no memory")
    own = ["of a part", "a rank is lost", "no memory"]
    first = ["callbacks.gradient_spikes: a spike", "trainer.loss_check: a spike", *own]
    assert [line.split(": ", 1)[1] for line in path.read_text().splitlines()] == [
        *first,
        *(f"rank {rank}: {text}" for rank in (1, 2) for text in own),
    ]


def test_a_traceback_reaches_console_and_file(console, tmp_path):
    with setup_logging(tmp_path / "run.log", console) as logger:
        try:
            raise ValueError("too deep")
        except ValueError:
            logger.exception("it broke")
    for text in (console.file.getvalue(), (tmp_path / "run.log").read_text()):
        assert "it broke" in text
        assert "ValueError: too deep" in text


def test_a_progress_bar_finds_the_console_of_the_log(console):
    assert run_console() is not console
    with setup_logging(None, console):
        assert run_console() is console
    assert run_console() is not console
