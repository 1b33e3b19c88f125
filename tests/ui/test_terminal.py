import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from ksuit_runner.errors import ConfigError
from ksuit_runner.ui import command_line, terminal

RUN_ID = "3f2a9c51e0d84b7aa1b2c3d4e5f60718"
LONG_KEY = "a_callback_with_a_long_name/a_dataset_with_a_long_name/" + "x" * 100


@dataclass
class Metric:
    last: float
    last_step: int
    best: float | None
    best_step: int | None
    direction: str


SUMMARY = {
    "accuracy/test": Metric(0.91, 200, 0.97534, 150, "higher"),
    "loss/train": Metric(0.5, 200, 0.25, 190, "lower"),
    "lr": Metric(1e-5, 200, 0.125, 7, "neutral"),
    LONG_KEY: Metric(12345.678, 200, float("nan"), 3, "lower"),
}


def colored(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=width, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_start_is_aligned_and_paths_below_the_current_folder_are_short(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal.print_start(console, RUN_ID, "cnn [digits]", "sqlite:///outputs/mlflow.db", tmp_path / "outputs" / "runs")
    assert text_of(console).splitlines() == [
        "run      cnn [digits]",
        f"id       {RUN_ID}",
        "tracked  sqlite:///outputs/mlflow.db",
        "folder   outputs/runs",
    ]


def test_the_end_in_a_file_is_plain_and_complete(console, tmp_path):
    command = command_line.resume_command(RUN_ID)
    terminal.print_end(console, SUMMARY, tmp_path, command, "KILLED")
    text = text_of(console)
    assert "\x1b" not in text
    rows = [line.split() for line in text.splitlines()]
    assert rows == [
        ["metric", "last", "best", "at", "update", "better"],
        ["accuracy/test", "0.91", "0.9753", "150", "↑"],
        ["loss/train", "0.5", "0.25", "190", "↓"],
        ["lr", "1e-05"],
        [LONG_KEY, "12345.7", "nan", "3", "↓"],
        ["status", "killed"],
        ["folder", str(tmp_path)],
        ["resume", *command.split()],
    ]


def test_the_end_without_metrics_has_no_table(console, tmp_path):
    terminal.print_end(console, {}, tmp_path, "again", "FAILED")
    assert [line.split()[0] for line in text_of(console).splitlines()] == ["status", "folder", "resume"]


def test_a_narrow_terminal_loses_no_character():
    console = colored(width=40)
    terminal.print_end(console, {LONG_KEY: SUMMARY[LONG_KEY]}, Path("/data"), f"resume={RUN_ID}", "FINISHED")
    terminal.print_table(console, ["optimizer.lr", "status", "run"], [["0.1", "finished", RUN_ID]], status_column=1)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text_of(console))
    assert "…" not in text
    assert text.count("x") >= 100
    assert f"resume={RUN_ID}" in text


def test_in_a_narrow_terminal_columns_are_left_out_before_anything_folds():
    console = colored(width=60)
    key = "loss/longer_dataset/ema_slow"
    console.print(terminal.metric_table(console, {key: Metric(0.5, 200, 0.25, 190, "lower")}))
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text_of(console)).splitlines()]
    assert ["metric", "last", "best", "at", "update", "better"] in lines and [key, "0.5", "0.25", "190", "↓"] in lines
    narrower = colored(width=44)
    narrower.print(terminal.metric_table(narrower, {key: Metric(0.5, 200, 0.25, 190, "lower")}))
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text_of(narrower)).splitlines()]
    assert ["metric", "last", "best"] in lines and [key, "0.5", "0.25"] in lines


@pytest.mark.parametrize("width", [90, 60])
def test_the_command_that_shows_the_runs_can_be_copied(width, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console, command = colored(width), "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db"
    where = f"MLflow, see it with:\n  mlflow ui --backend-store-uri sqlite:///{tmp_path}/outputs/mlflow.db"
    both = f"{where}\nTensorBoard, http://host{tmp_path}/runs"
    terminal.print_start(console, RUN_ID, "a", both, tmp_path / "runs")
    printed = re.sub(r"\x1b\[[0-9;]*m", "", text_of(console)).splitlines()
    assert f"  {command}" in printed and f"TensorBoard, http://host{tmp_path}/runs" in printed
    wide = colored(400)
    assert terminal.tracked_at(wide, where) == f"MLflow, see it with: {command}"
    terminal.print_start(wide, RUN_ID, "a", both, tmp_path / "runs")
    printed = re.sub(r"\x1b\[[0-9;]*m", "", text_of(wide)).splitlines()
    at = printed.index(f"tracked  MLflow, see it with: {command}")
    assert printed[at + 1] == f"         TensorBoard, http://host{tmp_path}/runs"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_hundred_metrics_fit_on_a_page(width):
    console = colored(width)
    neutral = {f"weight_norm/layers.{n}": Metric(n, 200, None, None, "neutral") for n in range(90)}
    directed = {f"accuracy/{n}": Metric(0.5, 200, 0.75, n, "higher") for n in range(10)}
    console.print(terminal.metric_table(console, neutral | directed))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text_of(console)).splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= width
    assert all(any(f"weight_norm/layers.{n} {n}" in line for line in lines) for n in range(90))
    assert all(re.match(rf"accuracy/{n} +0.5 +0.75 +{n} ", line) for n, line in enumerate(lines[2:12]))


def test_the_end_says_how_long_it_took_and_where_the_best_checkpoint_is(console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = tmp_path / "checkpoints" / "E1_U20_S640"
    terminal.print_end(console, {}, tmp_path / "run", "again", "FINISHED", seconds=3725, best=best)
    assert text_of(console).splitlines() == [
        "status  finished after 1h 02m",
        "folder  run",
        "best    checkpoints/E1_U20_S640",
        "resume  again",
    ]


def test_an_encoding_without_arrows_gets_words(tmp_path):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=200)
    terminal.print_end(console, {"loss": SUMMARY["loss/train"]}, tmp_path, "again", "FINISHED")
    file.flush()
    assert isinstance(file.buffer, io.BytesIO)
    assert b"lower" in file.buffer.getvalue()


def test_columns_of_numbers_are_set_to_the_right(console):
    rows = [["0.1", "[1,2]", "98.7", "finished"], ["10", "x", "", "failed"]]
    terminal.print_table(console, ["lr", "dims", "accuracy", "status"], rows, status_column=3)
    assert text_of(console).splitlines() == [
        " lr  dims   accuracy  status  ",
        "0.1  [1,2]      98.7  finished",
        " 10  x                failed  ",
    ]


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/env/bin/ksuit-runner", "ksuit-runner resume=abc"),
        ("/env/ksuit_runner/__main__.py", "python -m ksuit_runner resume=abc"),
        ("-c", "python -m ksuit_runner resume=abc"),
    ],
)
def test_the_resume_command_has_the_form_of_the_start(monkeypatch, program, command):
    monkeypatch.setattr(sys, "argv", [program])
    assert command_line.resume_command("abc") == command
    assert command_line.resume_command("abc", Path.cwd() / "outputs") == command
    assert command_line.resume_command("abc", Path("/a b")) == command.replace("resume", "\"output_dir='/a b'\" resume")


def test_no_color_is_respected_in_a_terminal(console, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal.print_error(terminal.make_console(), ConfigError("wrong"))
    assert "31m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.print_error(terminal.make_console(), ConfigError("wrong"))
    assert re.sub(r"\x1b\[[01]m", "", capsys.readouterr().out) == "error: wrong\n"


def test_a_console_on_stderr(monkeypatch, capsys):
    terminal.print_error(terminal.make_console(stderr=True), ConfigError("wrong"))
    assert capsys.readouterr().err == "error: wrong\n"


def test_an_error_is_red_and_at_most_six_lines_long():
    console = colored()
    terminal.print_error(console, ConfigError("callbacks.ema: unknown key [decay]\nDid you mean 'rate'?"))
    assert text_of(console).startswith("\x1b[1;31merror:\x1b[0m callbacks.ema: unknown key [decay]\nDid you mean")
    console = colored()
    terminal.print_error(console, ConfigError("\n".join(f"line {n}" for n in range(1, 10))))
    lines = text_of(console).splitlines()
    assert len(lines) == 6
    assert lines[4:] == ["line 5", "(4 more lines)"]
    console = colored()
    terminal.print_error(console, ConfigError())
    assert "ConfigError" in text_of(console)
