"""What a job of a sweep costs beside its training: `python tests/benchmarks/sweep_overhead.py [number of jobs]`.

A job takes from its start to its end. Besides, a sweep costs its start (imports, the check of all jobs) and its end
(the leaderboard and its plot), which are given divided by the number of jobs. A job may cost 1.3 times its own training
and 0.05 s.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from ksuit_runner.paths import SweepPaths
from ksuit_runner.record.journal import read_points
from ksuit_runner.sweep.job_status import read_ends

OVERRIDES = (
    *("model=linear", "callbacks=[accuracy]", "trainer.max_epochs=2", "checkpoint=at_end"),
    *("objective=accuracy/validation", "optimizer.lr=1e-2,1e-3"),
)


def training_seconds(journal: Path) -> float:
    """Return the time of a run's loop: from the first point, before the first update, to the checkpoint at its end."""
    (manifest,) = journal.parent.glob("artifacts/checkpoints/*/manifest.json")
    return manifest.stat().st_mtime - next(read_points(journal)).timestamp / 1000


def main() -> None:
    """Run the sweep and print the figures."""
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ksuit_runner", "-m", *OVERRIDES, f"output_dir={folder}"]
        start = time.perf_counter()
        subprocess.run([*command, f"seed=range(0,{jobs // 2})"], check=True, stdout=subprocess.DEVNULL)
        seconds = (time.perf_counter() - start) / jobs
        journals = [path for path in Path(folder).glob("runs/*/metrics.jsonl") if path.stat().st_size]
        training = median(map(training_seconds, journals))
        (sweep,) = Path(folder).glob("sweeps/*")
        job = median(end.seconds for end in read_ends(SweepPaths(folder, sweep.name)).values())
    allowed = 1.3 * training + 0.05
    print(f"{jobs} jobs, each {job:.3f} s, of which {training:.3f} s of training; {allowed:.3f} s allowed")
    print(f"the whole sweep, divided by its jobs: {seconds:.3f} s")


if __name__ == "__main__":
    main()
