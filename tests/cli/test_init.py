"""The tutorial, from its first command to its last, in the project that ``init`` makes."""

import re
import shlex
import subprocess
import sys
from functools import partial

import pytest
import torch
from command import REPOSITORY, environment
from preloaded import Preloaded, as_a_command

from ksuit_runner.cli.dispatch import _main
from ksuit_runner.errors import ConfigError, StorageError

TUTORIAL = (REPOSITORY / "docs" / "tutorial.md").read_text()
EXAMPLE = REPOSITORY / "examples" / "spirals"


@pytest.mark.slow
def test_the_commands_of_the_tutorial(tmp_path, monkeypatch):
    lines = re.findall(r"^(?:ksuit-runner|cd|python) .*$", TUTORIAL, re.MULTILINE)
    folder, log, preloaded, finished = tmp_path, tmp_path / "log", Preloaded(), 0
    for program, *arguments in map(shlex.split, lines):
        if program == "cd":
            folder = folder / arguments[0]
        elif program == "ksuit-runner":
            command = preloaded.start(folder, log, arguments, partial(as_a_command, environment()))
            assert command.wait() == 0, command.output()
            finished += "status  finished" in command.output()
        elif program == "python":
            surroundings = {**environment(), "PYTHONPATH": str(REPOSITORY)}
            subprocess.run([sys.executable, *arguments], cwd=folder, env=surroundings, check=True)
    assert finished == 5  # the commands that train a single run
    assert (folder / "weights.safetensors").exists()
    made, shipped = ({path.relative_to(base) for path in base.rglob("*")} for base in (folder, EXAMPLE))
    assert {path for path in shipped if "__pycache__" not in path.parts} <= made

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    (code,) = re.findall(r"^```python\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
    exec(code, names := {})
    assert len(names["metrics"]("last")) and not names["model"].training
    network = sys.modules["spirals"].Network((1, 8, 8), (10,), width=4)  # with whatever data is chosen beside it
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    del sys.modules["spirals"]

    ((arguments, said),) = re.findall(r"^\$ ksuit-runner (.*)\nerror: (.*)$", TUTORIAL, re.MULTILINE)
    with pytest.raises(ConfigError, match=re.escape(said)):
        _main(shlex.split(arguments))


def test_a_folder_with_hidden_files_only_is_filled_and_they_stay(tmp_path, monkeypatch, capsys):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("mine")
    (tmp_path / ".gitignore").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert _main(["init", "."]) == 0
    printed = capsys.readouterr().out
    assert "spirals.py" in printed and ".venv" not in printed and ".gitignore" not in printed and "cd " not in printed
    assert (tmp_path / "conf" / "experiment" / "spirals.yaml").is_file()
    assert {(tmp_path / name).read_text() for name in (".gitignore", ".venv/pyvenv.cfg")} == {"mine"}


def test_a_full_disk_is_a_line_that_names_the_first_file(tmp_path, full_disk):
    with pytest.raises(StorageError, match=f"^{tmp_path}/new/.*: File too large$"):
        _main(["init", str(tmp_path / "new")])


def test_nothing_is_overwritten(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for folder in (tmp_path, file):
        with pytest.raises(ConfigError, match="Nothing is overwritten"):
            _main(["init", str(folder)])
    assert [*tmp_path.iterdir()] == [file]
    with pytest.raises(ConfigError, match="seed=1: with init= nothing else can be given"):
        _main(["init", str(tmp_path / "new"), "seed=1"])
