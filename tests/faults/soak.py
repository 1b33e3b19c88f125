"""Kills and suspends runs at random for a while, and reports how often, and what that changed.

    make soak                                   # 20 minutes, two runs at a time
    make soak ARGS="--minutes 5 --seed 7"       # other kills than with seed 0

Every run is killed, suspended or loses power two to five times, at random points and times: the process that trains,
its recorder, or both. It is resumed with 0 or 2 data workers, on this host, in another container or on another machine,
with a wrong clock, with output that nobody reads; and compared with the uninterrupted run: bytes of all checkpoints,
points in the journal and in MLflow, status, updates, samples, learning rate. A power cut loses what is not synced, as a
whole or in part. What is suspended wakes up when another process has taken its run over. The model has weights that are
not row-major and a buffer that is reassigned. A difference is printed with the kills that led to it, which the same
seed repeats.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from crashes import Project, random_kills
from preloaded import Preloaded

from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker import mlflow_store as embedded

_LONGEST_S = 2.5


def attack(folder: Path, seeds: Iterator[int] | range, deadline: float) -> tuple[int, int, int, int, list[str]]:
    """Kill runs until the deadline; return how many runs, kills, recorders hit and takeovers, and differences."""
    template = folder / "template"
    embedded.open_store(OutputPaths(template))
    project = Project(folder / "project", Preloaded())
    project.clear(template)
    project.run()
    reference, runs, found = project.result(), 0, []
    for seed in seeds:
        if time.monotonic() > deadline:
            break
        kills = random_kills(seed, _LONGEST_S)
        project.clear(template)
        try:
            differences = project.survive(kills, last_workers=2 * (seed % 3 == 0)).differences(reference)
        except (AssertionError, TimeoutError, OSError) as error:
            differences = [str(error)]
        finally:
            project.abandon()
        runs += 1
        if differences:
            found.append(f"seed {seed}: {kills}\n    " + "\n    ".join(differences))
            print(found[-1], flush=True)
        if runs % 10 == 0:
            done = f"{project.kills} kills, {project.recorders_hit} recorders hit, {project.takeovers} takeovers"
            print(f"{done} in {runs} runs, {len(found)} differences", flush=True)
    return runs, project.kills, project.recorders_hit, project.takeovers, found


def main() -> int:
    """Attack in two processes and print the sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(given.processes) as pool:
        jobs = []
        for number in range(given.processes):
            subfolder = Path(folder) / str(number)
            subfolder.mkdir()
            seeds = range(1000 * given.seed + number, 10**9, given.processes)
            jobs.append(pool.submit(attack, subfolder, seeds, deadline))
        results = [job.result() for job in jobs]
    runs, kills, recorders, takeovers = (sum(numbers) for numbers in list(zip(*results, strict=True))[:4])
    differences = sum(len(found) for *_, found in results)
    print(
        f"{kills} kills, {recorders} recorders killed or suspended, {takeovers} takeovers of what was suspended, "
        f"in {runs} runs: "
        f"{differences} runs differ from the uninterrupted run"
    )
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
