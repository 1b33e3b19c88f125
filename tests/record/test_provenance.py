import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from ksuit_runner import __version__
from ksuit_runner.record import provenance as environment
from ksuit_runner.ui import command_line

NO_GIT = {"commit": None, "branch": None, "dirty": None}


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=A Person", "-c", "user.email=person@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, outside of every repository, as the current one."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def repository(folder: Path) -> Path:
    git("init", "--quiet", "--initial-branch", "trunk")
    (folder / "code.py").write_text("rate = 1\n")
    (folder / ".gitignore").write_text("outputs/\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "start")
    return folder


def test_the_record_names_code_packages_and_hardware_and_fits_into_json(repository):
    record = environment.collect()
    assert json.loads(json.dumps(record)) == record
    assert record["folder"] == repository.name
    assert record["git"] == {"commit": git("rev-parse", "HEAD"), "branch": "trunk", "dirty": False}
    assert record["python"] == platform.python_version()
    assert record["versions"]["ksuit_runner"] == __version__
    assert record["versions"]["torch"] == version("torch")
    assert record["packages"]["hydra-core"] == record["versions"]["hydra-core"]
    assert record["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert record["hardware"]["memory_bytes"] > 2**20
    assert record["hardware"]["cpu"]
    assert record["hardware"]["gpu_count"] == len(record["hardware"]["gpus"]) == torch.cuda.device_count()


def test_no_environment_variable_is_stored(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "opensesame-4711")
    text = json.dumps(environment.collect())
    assert "opensesame" not in text
    assert "MLFLOW_TRACKING_PASSWORD" not in text


@pytest.mark.parametrize(
    ("program", "start"),
    [
        ("/somewhere/ksuit_runner/__main__.py", "python -m ksuit_runner"),
        ("/somewhere/bin/ksuit-runner", "ksuit-runner"),
        ("my train.py", "'my train.py'"),
    ],
)
def test_the_command_can_be_given_to_a_shell_again(program, start):
    arguments = ["callbacks=[ema,accuracy]", "name=it's new", "optimizer.lr=3e-4"]
    command = command_line.command_line([program, *arguments])
    assert command.startswith(start + " ")
    assert shlex.split(command)[-3:] == arguments


def test_the_command_of_a_module_that_was_really_started(tmp_path):
    package = tmp_path / "ksuit_probe"
    package.mkdir()
    (package / "__main__.py").write_text(
        "from ksuit_runner.record.provenance import command_line\nprint(command_line())\n"
    )
    root = Path(environment.__file__).parents[1]
    command = [sys.executable, "-m", "ksuit_probe", "a=[b]"]
    search_path = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": search_path}
    )
    assert done.stdout.strip() == "python -m ksuit_probe 'a=[b]'"


def test_changes_and_untracked_files_are_dirty_and_ignored_files_are_not(repository):
    (repository / "outputs").mkdir()
    (repository / "outputs" / "big.bin").write_text("0")
    assert environment.git_state()["dirty"] is False
    assert environment.uncommitted_diff() == ""
    (repository / "new.py").write_text("1\n")
    assert environment.git_state()["dirty"] is True
    (repository / "new.py").unlink()
    (repository / "code.py").write_text("rate = 2\n")
    assert environment.git_state()["dirty"] is True


@pytest.mark.parametrize("setting", ["diff.noprefix", "diff.mnemonicPrefix"])
def test_the_diff_brings_a_clean_checkout_to_the_code_that_ran(repository, monkeypatch, setting):
    git("config", setting, "true")
    (repository / "code.py").write_text("rate = 2  # größer\n")
    (repository / "staged.py").write_text("\n\n1\n\n")
    git("add", "staged.py")
    (repository / "sub").mkdir()
    (repository / "loose.py").write_text("secret\n")
    monkeypatch.chdir(repository / "sub")
    diff = environment.uncommitted_diff()
    assert diff.startswith("# untracked: loose.py\n")
    assert "secret" not in diff
    monkeypatch.chdir(repository)
    git("reset", "--quiet", "--hard")
    (repository / "outputs").mkdir()
    (repository / "outputs" / "stored.diff").write_text(diff)
    git("apply", "outputs/stored.diff")
    assert (repository / "code.py").read_text() == "rate = 2  # größer\n"
    assert (repository / "staged.py").read_text() == "\n\n1\n\n"


def test_a_large_diff_is_cut_and_says_so(repository):
    (repository / "code.py").write_text("größe = 1\n" * 300_000)
    diff = environment.uncommitted_diff()
    assert environment.DIFF_LIMIT - 10 < len(diff.encode()) <= environment.DIFF_LIMIT
    assert diff.endswith(f"# cut at {environment.DIFF_LIMIT} bytes\n")


def test_without_a_repository_nothing_is_said_about_code(folder):
    assert environment.git_state() == NO_GIT
    assert environment.uncommitted_diff() == ""


def test_without_git_nothing_is_said_about_code(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert environment.git_state() == NO_GIT
    assert environment.uncommitted_diff() == ""


def test_a_repository_without_a_commit_and_a_checkout_without_a_branch(folder):
    git("init", "--quiet", "--initial-branch", "trunk")
    (folder / "code.py").write_text("1\n")
    assert environment.git_state() == {"commit": None, "branch": "trunk", "dirty": True}
    assert environment.uncommitted_diff() == "# untracked: code.py\n"
    git("add", ".")
    git("commit", "--quiet", "--message", "start")
    git("checkout", "--quiet", "--detach")
    assert environment.git_state() == {"commit": git("rev-parse", "HEAD"), "branch": None, "dirty": False}


def test_importing_it_does_not_import_torch():
    script = "import sys, ksuit_runner.record.provenance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
