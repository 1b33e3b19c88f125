"""The command line of the benchmarks: `make bench`, or `PYTHONPATH=tests python -m benchmarks NAME ...`."""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from .machine import Load, describe
from .measure import Scale
from .result import Result

BENCHMARKS = (
    *("small_model", "large_model", "callback_cost", "metric_logging", "checkpoint_stall"),
    *("data_loading", "epoch_order", "start_up", "store_scale", "evaluation", "accelerator", "projects"),
    *("ddp", "fsdp", "sharded_checkpoint"),
)
"""Modules of this package with a function `measure(scale, folder)`, in the order in which they run."""


def main() -> None:
    arguments = _arguments()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # One thread for everyone: on a machine that others use too, threads that wait for each other are what one measures.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, os.getcwd())  # the runner and its callbacks, where they are not installed
    machine, results = describe(), {}
    print(_heading(machine), flush=True)
    scale = Scale(arguments.tiny, arguments.rounds)
    for name in arguments.names or BENCHMARKS:
        results[name] = _measure(name, scale)
    if arguments.json:
        found = {"machine": machine, "when": datetime.now(UTC).isoformat(timespec="seconds"), "tiny": scale.is_tiny}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found | {"results": results}, indent=2) + "\n")
        print(f"written to {arguments.json}")


def _measure(name: str, scale: Scale) -> dict[str, Any]:
    module = import_module(f".{name}", __package__)
    load = Load()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        result: Result = module.measure(scale, Path(folder))
    share = load.by_others()
    result.notes.append(f"other processes took {100 * share:.0f}% of the machine meanwhile")
    print(*result.markdown(), "", sep="\n", flush=True)
    return result.as_json() | {"load_by_others": share}


def _heading(machine: dict[str, Any]) -> str:
    versions = [f"{name} {found or 'not installed'}" for name, found in machine["versions"].items()]
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}"
    return "\n".join([hardware, ", ".join(versions), ""])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Compare the runner with its peers, side by side.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"what to run; all by default: {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often contestants take turns")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: shows that it works, measures nothing")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"there is no '{unknown[0]}'; there are {', '.join(BENCHMARKS)}")
    return arguments


if __name__ == "__main__":
    main()
