"""How long a person waits: for help, for a config, for the first update of a run, and of the next one."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from time import perf_counter

from .driver import CLOCK, drive
from .measure import Scale, compete
from .result import Result

HELP, CONFIG, IMPORTS = "--help", "--cfg job", "bare imports of torch and mlflow"
FIRST, RESUMED, NEXT = "command to first update", "resume to first update", "next run of a process to first update"


def measure(scale: Scale, folder: Path) -> Result:
    result = Result("Start-up: digits, perceptron, all defaults on, an output folder that has been used before")
    _next(folder)
    contestants = {
        HELP: partial(_python, "-m", "ksuit_runner", "--help"),
        CONFIG: partial(_python, "-m", "ksuit_runner", "--cfg", "job"),
        IMPORTS: partial(_python, "-c", "import torch, mlflow"),
        FIRST: partial(_start, folder, "trainer.max_updates=2"),
        RESUMED: partial(_resume, folder),
        NEXT: partial(_next, folder),
    }
    contest = compete(contestants, scale.turns(7))
    result.add_contest(contest, "s")
    result.aim(HELP, contest.spread(HELP), 0.5, "s")
    result.aim(CONFIG, contest.spread(CONFIG), 0.5, "s")
    result.aim(f"{FIRST} - {IMPORTS}", contest.difference(FIRST, IMPORTS), 0.5, "s")
    result.notes.append(f"{RESUMED} - {IMPORTS}: {contest.difference(RESUMED, IMPORTS).median:.2f} s")
    return result


def _python(*arguments: str) -> float:
    start = perf_counter()
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])  # where Clock is
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    return perf_counter() - start


def _start(folder: Path, *overrides: str) -> float:
    """Start a run and return how long it took to its first update; it ends soon after."""
    start = time.time()
    _python("-m", "ksuit_runner", f"output_dir={folder}", "model=mlp", CLOCK, *overrides)
    return _first_update(folder) - start


def _resume(folder: Path) -> float:
    """Go on with the last run for an update more."""
    start = time.time()
    updates = json.loads(_clock(folder).read_text())["at"]
    _python("-m", "ksuit_runner", f"output_dir={folder}", "resume=last", f"trainer.max_updates={updates + 1}")
    return _first_update(folder) - start


def _next(folder: Path) -> float:
    """Do a run in this process, which has imported everything."""
    start = time.time()
    driven = drive(folder, "model=mlp", "trainer.max_updates=1")
    return float(json.loads((driven.paths.run_dir / "clock.json").read_text())["began"]) - start


def _clock(folder: Path) -> Path:
    return max(folder.glob("runs/*/clock.json"), key=lambda path: path.stat().st_mtime)


def _first_update(folder: Path) -> float:
    return float(json.loads(_clock(folder).read_text())["began"])
