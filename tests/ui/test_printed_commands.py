"""The commands that a run prints are what a shell takes, in folders of any name."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command import REPOSITORY

from ksuit_runner.config.overrides import parse, to_text
from ksuit_runner.ui.command_line import resume_command, sync_command

STRANGE = "a, b=c #d'e;f \"ü\" $HOME `g` (h) [i] {j} ~k\\ !l & m* 'n"


NAMES = (STRANGE, "plain", "with space", "größe", "null", "1.10", "a'", "a\\", "-x", "${seed}")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_quoted_for_hydra_and_for_the_shell(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ksuit-runner"])
    folder = Path("/data") / name
    for command, key in ((resume_command, "resume"), (sync_command, "sync")):
        program, output_dir, what = shlex.split(command("abc123", folder))
        assert (program, what) == ("ksuit-runner", f"{key}=abc123")
        assert parse(output_dir).value() == str(folder)
    assert command("abc123", Path("/data/runs")) == "ksuit-runner output_dir=/data/runs sync=abc123"


@pytest.mark.slow
def test_what_is_printed_really_works_in_a_folder_with_any_name(tmp_path):
    project = tmp_path / STRANGE
    (project / "conf" / "model").mkdir(parents=True)
    (project / "conf" / "model" / "größe.yaml").write_text("_target_: ksuit_runner.models.linear.Linear\n")
    (project / "callbacks").mkdir()
    (project / "callbacks" / "__init__.py").touch()  # does not hide the callbacks that ship
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1", "PYTHONUTF8": "1"}

    def shell(line):
        options = {"cwd": project, "env": environment, "capture_output": True, "text": True, "timeout": 240}
        done = subprocess.run(line, shell=True, **options)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    given = [
        f"output_dir={to_text(str(project / 'out, put'))}",
        "model='größe'",
        "callbacks=[]",
        "trainer.max_epochs=1",
    ]
    said = shell(shlex.join(["python", "-m", "ksuit_runner", *given]))
    line = next(line for line in said.splitlines() if line.startswith("resume"))
    assert "nothing is left to do" in shell(line.removeprefix("resume").strip())
    store = next(line for line in said.splitlines() if "mlflow ui" in line).partition("--backend-store-uri ")[2]
    assert shlex.split(store) == [f"sqlite:///{project}/out, put/mlflow.db"]
