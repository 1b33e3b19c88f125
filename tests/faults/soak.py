"""Kills runs at random places and times for a while, and says how many kills there were and what they changed.

    make soak                                   # 20 minutes, two runs at a time
    make soak ARGS="--minutes 5 --seed 7"       # other kills than those of seed 0

Every run is killed one to four times, resumed with 0 or 2 data workers, and compared with the run that was never
killed: bytes of all checkpoints, points in the journal and in MLflow, status, updates, samples, learning rate. A
difference is printed with the kills that lead to it, which come again from the same seed.
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
from ksuit_runner.tracker import embedded

_LONGEST_S = 4.0


def attack(folder: Path, seeds: Iterator[int] | range, deadline: float) -> tuple[int, int, list[str]]:
    """Kill runs until the deadline; return the number of runs, of kills, and what was found."""
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
        runs += 1
        if differences:
            found.append(f"seed {seed}: {kills}\n    " + "\n    ".join(differences))
            print(found[-1], flush=True)
        if runs % 10 == 0:
            print(f"{runs} runs, {project.kills} kills, {len(found)} differences", flush=True)
    return runs, project.kills, found


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
            place = Path(folder) / str(number)
            place.mkdir()
            seeds = range(1000 * given.seed + number, 10**9, given.processes)
            jobs.append(pool.submit(attack, place, seeds, deadline))
        results = [job.result() for job in jobs]
    runs, kills, found = (sum(parts) if isinstance(parts[0], int) else parts for parts in zip(*results, strict=True))
    differences = sum(map(len, found))
    print(f"{kills} kills in {runs} runs, {differences} runs differ from the run that was never killed")
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
