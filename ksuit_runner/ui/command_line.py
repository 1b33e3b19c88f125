"""Command lines: the one that started this process, and those that are printed for the user."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ksuit_runner.config.overrides import shell_word, to_text
from ksuit_runner.security.masking import mask_text

DEFAULT_OUTPUT_DIR = "outputs"
"""Where runs are if the config does not say otherwise."""


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return the command that started this process, quoted for a shell, with passwords masked.

    Args:
        argv: The arguments, by default those of the process; the first one is the program.
    """
    program, *arguments = sys.argv if argv is None else argv
    path = Path(program)
    if path.name == "__main__.py":
        return mask_text(shlex.join(["python", "-m", path.parent.name, *arguments]))
    name = path.name if path.stem == "ksuit-runner" else program
    return mask_text(shlex.join([name, *arguments]))


def resume_command(run_id: str, output_dir: Path | None = None) -> str:
    """Return the command that resumes a run, in the form in which this process was started.

    Args:
        run_id: Id of the run.
        output_dir: Where the run is; it is part of the command unless it is the default.
    """
    return _command("resume", run_id, output_dir)


def fork_command(run_id: str, output_dir: Path | None = None) -> str:
    """Return the command that starts a new run from a run; see ``resume_command``."""
    return _command("fork", run_id, output_dir)


def evaluate_command(run_id: str, output_dir: Path | None = None) -> str:
    """Return the command that evaluates a run; see ``resume_command``."""
    return _command("evaluate", run_id, output_dir)


def sync_command(run_id: str, output_dir: Path | None = None) -> str:
    """Return the command that sends the tracker what it is missing of a run; see ``resume_command``."""
    return _command("sync", run_id, output_dir)


def leaderboard_command(sweep_id: str, output_dir: Path | None = None) -> str:
    """Return the command that shows the leaderboard of a sweep; see ``resume_command``."""
    return _command("leaderboard", sweep_id, output_dir)


def program() -> str:
    """Return the command that this process was started with, without its arguments."""
    return "ksuit-runner" if Path(sys.argv[0]).stem == "ksuit-runner" else "python -m ksuit_runner"


def _command(mode: str, run_id: str, output_dir: Path | None) -> str:
    elsewhere = output_dir is not None and output_dir != Path.cwd() / DEFAULT_OUTPUT_DIR
    where = [shell_word(f"output_dir={to_text(str(output_dir))}")] if elsewhere else []  # for Hydra, and for the shell
    return " ".join([program(), *where, f"{mode}={run_id}"])
