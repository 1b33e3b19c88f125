"""What only a GPU can show: `PYTHONPATH=tests python -m benchmarks.accelerator_check`, in about four minutes.

With `--cpu` it tries itself. It prints a line for each check, and exits with 1 if one of them fails.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file

from callbacks.peak_memory import PeakMemory
from callbacks.throughput import Throughput
from callbacks.times import Times
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.host_buffers import HostBuffers
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import undisturbed
from ksuit_runner.paths import OutputPaths, PathProvider

from . import accelerator
from .driver import drive
from .measure import Scale

Finding = tuple[bool, str]

GPT = (
    *("data=python_docs", "trainer.precision=bfloat16", "model.dropout=0.1", "trainer.accumulation_steps=2"),
    *("trainer.max_epochs=null", "trainer.max_updates=90", "checkpoint=every_100_updates"),
    "checkpoint.every_n_updates=40",
)
KILLED = {
    "default run": ("trainer.max_epochs=4",),
    "two data workers, pinned memory": ("trainer.max_epochs=4", "data.num_workers=2"),
    "gpt in bfloat16, dropout, accumulation": GPT,
    "float16 with a loss scaler": ("trainer.max_epochs=4", "trainer.precision=float16"),
    "channels last in bfloat16": ("trainer.max_epochs=4", "trainer.precision=bfloat16", "trainer.channels_last=true"),
    "compiled": ("trainer.max_epochs=4", "trainer.precision=bfloat16", "trainer.compile=true"),
    "watched": ("trainer.max_epochs=4", "callbacks=[ema,accuracy,times,flops,profiler,memory_snapshot]"),
}
"""Runs that are killed after update 50 and resumed."""

GPU_ONLY = ("compiled", "watched")

MEASURED = (*Throughput.logs, *PeakMemory.logs, *Times.logs, "flops_per_second")
"""Patterns of the metrics that two equal runs do not share."""

FIRST_QUIET, LAST_QUIET = 41, 49
"""The updates after the first and up to the last of these log nothing."""


class Waits(CallbackBase):
    """Lets torch warn of whatever waits for the device, in updates that log nothing."""

    def _track_after_update_step(self, update_counter: UpdateCounter) -> None:
        if self.trainer.device.type == "cuda" and update_counter.update in (FIRST_QUIET, LAST_QUIET):
            torch.cuda.set_sync_debug_mode("warn" if update_counter.update == FIRST_QUIET else "default")


class Place(CallbackBase):
    """Notes the current device while the run trains."""

    def _track_after_update_step(self, update_counter: UpdateCounter) -> None:
        current = torch.cuda.current_device() if self.trainer.device.type == "cuda" else None
        (self.path_provider.run_dir / "place").write_text(json.dumps([current, self.trainer.device.index]))


def main() -> None:
    device = "cpu" if "--cpu" in sys.argv[1:] else "cuda"
    os.environ.setdefault("OMP_NUM_THREADS", "1" if device == "cpu" else "4")
    sys.path.insert(0, os.getcwd())
    start, has_failed = perf_counter(), False
    with tempfile.TemporaryDirectory(prefix="accelerator-") as name:
        folder = Path(name)
        checks: dict[str, Callable[[], Finding]] = {
            "nothing waits for the device": partial(no_waits, folder, device),
            "the device of a run, and that of its process": partial(place, folder, device),
            "a snapshot is pinned": partial(pinned, device),
            "checkpoint": partial(stall, folder, device),
            "gpt beside a bare loop": partial(speed, folder, device),
        }
        # One after another what is measured; before that, side by side, what is compared bit by bit.
        with ThreadPoolExecutor(1 if device == "cpu" else len(KILLED)) as pool:
            killed = {
                f"killed and resumed: {label}": pool.submit(killed_and_resumed, folder / str(number), device, overrides)
                for number, (label, overrides) in enumerate(KILLED.items())
                if device != "cpu" or label not in GPU_ONLY
            }
            waiting: dict[str, Callable[[], Finding]] = {label: future.result for label, future in killed.items()}
            for label, check in (waiting | checks).items():
                is_good, text = _attempt(check)
                has_failed |= not is_good
                verdict = "ok   " if is_good else "FAILS"
                print(f"{perf_counter() - start:6.1f} s  {verdict}  {label}: {text}", flush=True)
    raise SystemExit(int(has_failed))


def _attempt(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# Exact resume


def killed_and_resumed(folder: Path, device: str, overrides: Sequence[str]) -> Finding:
    """Kill a run, resume it, and compare it with one that was not killed."""
    given = ("tracker=noop", f"trainer.device={device}", *overrides)
    whole, cut = folder / "whole", folder / "cut"
    first, second = (_start(output, *given) for output in (whole, cut))
    while second.poll() is None and _updates_in(cut) < 50:
        time.sleep(0.005)
    was_killed = second.poll() is None
    second.kill()
    second.communicate()
    printed, _ = first.communicate()
    if first.returncode or not was_killed:
        return False, "it ended before it could be killed" if not first.returncode else printed.strip()[-200:]
    resumed = _start(cut, "resume=last")
    printed, _ = resumed.communicate()
    starts = [line.strip() for line in printed.splitlines() if "starts from checkpoint" in line]
    if resumed.returncode or not starts:
        return False, printed.strip()[-200:]
    found, expected = _files(cut), _files(whole)
    different = sorted(name for name in expected if found.get(name) != expected[name])
    return not different, f"{starts[0]}; " + (f"others are {', '.join(different)}" if different else "same bytes")


def _start(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ksuit_runner", f"output_dir={folder}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _updates_in(folder: Path) -> int:
    lines = [line for path in folder.glob("runs/*/metrics.jsonl") for line in path.read_text().splitlines(True)]
    whole = [line for line in lines if line.endswith("}\n")]
    return int(json.loads(whole[-1])["s"]) if whole else 0


def _files(folder: Path) -> dict[str, str]:
    """Return hashes of the tensors of the last checkpoint, and what was logged, by name."""
    [run] = (folder / "runs").iterdir()
    checkpoints = run / "artifacts" / "checkpoints"
    last = checkpoints / (checkpoints / "latest").read_text().strip()
    hashes = {f"{last.name}/{path.name}": _hash(path) for path in last.glob("*.safetensors")}
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for point in points:
        for key, value in point["m"].items():
            if not any(fnmatchcase(key, pattern) for pattern in MEASURED):
                hashes[f"{key} at {point['s']}"] = repr(value)
    return hashes


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The device


def no_waits(folder: Path, device: str) -> Finding:
    """Show that updates which log nothing never wait for the device."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _drive(folder, device, Waits, "trainer.max_updates=60", "callbacks=[ema]", "data.num_workers=2")
    places = sorted({f"{item.filename}:{item.lineno}" for item in seen if "synchroniz" in str(item.message)})
    return not places, f"{len(places)} places wait in updates {FIRST_QUIET + 1} to {LAST_QUIET} {places[:3]}"


def place(folder: Path, device: str) -> Finding:
    """Show that a run makes its device the current one, the last one there is, and leaves the process as it was."""
    count = torch.cuda.device_count() if device == "cuda" else 0
    wanted = f"cuda:{count - 1}" if count else device
    before = _state(count)
    run_dir = _drive(folder, wanted, Place, "trainer.max_updates=2").run_dir
    current, used = json.loads((run_dir / "place").read_text())
    is_left = _state(count) == before
    return (
        current == used and is_left,
        f"{wanted} of {count}; the current one is {current}, and later as before: {is_left}",
    )


def _state(gpus: int) -> Any:
    states = [torch.cuda.get_rng_state(index).tolist() for index in range(gpus)]
    return states, torch.get_rng_state().tolist(), torch.cuda.current_device() if gpus else None


def _drive(folder: Path, device: str, callback: type[CallbackBase], *overrides: str) -> PathProvider:
    """Do a run in this process with one more callback."""
    target = {"callbacks.probe": {"_target_": f"{__package__}.accelerator_check.{callback.__name__}"}}
    given = ("tracker=noop", f"trainer.device={device}", "checkpoint=at_end", *overrides)
    return drive(folder / callback.__name__.lower(), *given, more=target).paths


# Checkpoints


def pinned(device: str) -> Finding:
    """Show that the memory of a snapshot is pinned, without the rounding of torch's own pinned memory."""
    buffers = HostBuffers()
    tensors = {"one": torch.arange(3e6, device=device), "other": torch.arange(3e6, device=device).view(3, -1).T}
    copied = buffers.copy({"file": tensors})["file"]
    is_same = all(part.equal(tensors[name].cpu()) for name, part in copied.items())
    is_pinned = device == "cpu" or all(part.is_pinned() for part in copied.values())
    size = copied["one"].untyped_storage().nbytes() / buffers.size
    return is_same and is_pinned and size < 1.01, f"pinned {is_pinned}, memory {size:.3f} x the state"


def stall(folder: Path, device: str) -> Finding:
    """Show that a snapshot is whole while training goes on, and how long training waits for it."""
    size = 25_000 if device == "cpu" else 2_500_000  # 4 GB on a GPU
    model = {f"t{i}": torch.randn(size, device=device) for i in range(400)}
    paths = PathProvider(OutputPaths(folder / "stall").output_dir, "run00000")
    writer, counter, times = CheckpointWriter(paths), UpdateCounter(1, 1, max_updates=100), []
    expected: dict[str, torch.Tensor] = {}
    for counter.update in range(4):
        expected = {name: tensor.clone().cpu() for name, tensor in list(model.items())[-20:]}
        _wait(device)
        start = perf_counter()
        writer.save(counter, model, {})
        times.append(perf_counter() - start)
        for tensor in model.values():  # training goes on while it is written
            tensor.add_(1)
        writer.wait()
    writer.close()
    start = perf_counter()
    torch.save(model, folder / "plain.pt")
    plain = perf_counter() - start
    written = load_file(paths.checkpoints_dir / "E3_U3_S3" / "model.safetensors")
    is_whole = all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    stalled = median(times[1:])
    text = f"first {times[0] * 1e3:.0f} ms, then {stalled * 1e3:.0f}, torch.save {plain * 1e3:.0f}"
    return is_whole and stalled < plain, f"{text}; {'whole' if is_whole else 'TORN'}"


# Speed


def speed(folder: Path, device: str) -> Finding:
    """Compare with a bare loop, see the benchmark `accelerator`."""
    with undisturbed():
        result = accelerator.measure(Scale(is_tiny=device == "cpu", rounds=2), folder)
    found = [f"{aim.text} {aim.spread.median:.3f}" for aim in result.aims]
    return device == "cpu" or all(aim.is_reached for aim in result.aims), "; ".join(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
