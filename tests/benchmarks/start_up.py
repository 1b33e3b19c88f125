"""How long the user waits: for help, for a config, for the first update of a run, and of the next one."""

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
BY_HAND = "a script with one AdamW step and one metric in MLflow"
FIRST, RESUMED, NEXT = "command to first update", "resume to first update", "next run of a process to first update"
RANKS = "command to first update of two ranks"

SCRIPT = """
import sys, torch, mlflow
weight = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.AdamW([weight], fused=True)
weight.sum().backward()
optimizer.step()
mlflow.set_tracking_uri(sys.argv[1])
with mlflow.start_run():
    mlflow.log_metric("loss", 1.0, step=1)
"""


def measure(scale: Scale, folder: Path) -> Result:
    result = Result("Start-up: digits, perceptron, all defaults on, an output folder that has been used before")
    _next(folder)
    contestants = {
        HELP: partial(_python, "-m", "ksuit_runner", "--help"),
        CONFIG: partial(_python, "-m", "ksuit_runner", "--cfg", "job"),
        IMPORTS: partial(_python, "-c", "import torch, mlflow"),
        BY_HAND: partial(_python, "-c", SCRIPT, f"sqlite:///{folder / 'by_hand.db'}"),
        FIRST: partial(_start, folder, "trainer.max_updates=2"),
        RANKS: partial(_start, folder, "trainer.max_updates=2", "trainer=ddp", "ranks=2"),
        RESUMED: partial(_resume, folder),
        NEXT: partial(_next, folder),
    }
    contestants[BY_HAND]()  # makes its store, as the runner's is made
    contest = compete(contestants, scale.turns(7))
    result.add_contest(contest, "s")
    result.aim(HELP, contest.spread(HELP), 0.5, "s")
    result.aim(CONFIG, contest.spread(CONFIG), 0.5, "s")
    result.aim(f"{FIRST} - {IMPORTS}", contest.difference(FIRST, IMPORTS), 0.5, "s")
    result.aim(f"{RANKS} / {FIRST}", contest.ratio(RANKS, FIRST), 1.5)
    result.notes.append(f"{FIRST} - {BY_HAND}: {contest.difference(FIRST, BY_HAND).median:.2f} s")
    result.notes.append(f"{RESUMED} - {IMPORTS}: {contest.difference(RESUMED, IMPORTS).median:.2f} s")
    return result


def _python(*arguments: str) -> float:
    start = perf_counter()
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])  # where Clock is
    # Without what MLflow has put into this process's environment for other benchmarks.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment["PYTHONPATH"] = path
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return perf_counter() - start


def _start(folder: Path, *overrides: str) -> float:
    """Start a run and return how long it took to its first update; it ends soon after."""
    start = time.time()
    _python("-m", "ksuit_runner", f"output_dir={folder}", "model=mlp", CLOCK, *overrides)
    return _first_update(folder) - start


def _resume(folder: Path) -> float:
    """Resume the last run for one more update."""
    start = time.time()
    updates = json.loads(_clock(folder).read_text())["at"]
    _python("-m", "ksuit_runner", f"output_dir={folder}", "resume=last", f"trainer.max_updates={updates + 1}")
    return _first_update(folder) - start


def _next(folder: Path) -> float:
    """Run in this process, which has imported everything."""
    start = time.time()
    driven = drive(folder, "model=mlp", "trainer.max_updates=1")
    return float(json.loads((driven.paths.run_dir / "clock.json").read_text())["began"]) - start


def _clock(folder: Path) -> Path:
    return max(folder.glob("runs/*/clock.json"), key=lambda path: path.stat().st_mtime)


def _first_update(folder: Path) -> float:
    return float(json.loads(_clock(folder).read_text())["began"])
