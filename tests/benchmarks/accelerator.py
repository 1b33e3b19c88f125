"""With a GPU: tokens per second of a large gpt beside a bare loop, and what waits for the device."""

from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.python_docs import PythonDocs
from ksuit_runner.models.gpt import Gpt

from .driver import drive
from .measure import Contest, Scale, Spread, compete
from .result import Result, Value

RUNNER, HAND = "this runner, all defaults and EMA", "bare loop"
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


class Profiled(CallbackBase):
    """Counts the calls that wait for the device while a number of updates are done, with none that logs among them."""

    def __init__(self, first: int, last: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first = first
        self.last = last
        devices = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profile = profile(activities=[ProfilerActivity.CPU, *devices])

    def _track_after_update_step(self, update_counter: UpdateCounter) -> None:
        if update_counter.update == self.first:
            self.profile.start()
        if update_counter.update == self.last:
            self.profile.stop()
            waits = sum(event.count for event in self.profile.key_averages() if event.key in WAITS)
            (self.path_provider.run_dir / "waits").write_text(str(waits))


def measure(scale: Scale, folder: Path) -> Result:
    result = Result("GPU: a gpt with 125 M parameters, bfloat16, compiled")
    if not torch.cuda.is_available() and not scale.is_tiny:
        result.notes.append("skipped: there is no GPU")
        return result
    large, small = {"embed_dim": 896, "depth": 13, "num_heads": 14}, {"embed_dim": 16, "depth": 1, "num_heads": 2}
    shape, context, batch = scale.pick((large, 1024, 16), (small, 32, 2))
    updates = scale.pick(60, 8)
    common = (shape, context, batch, updates, not scale.is_tiny)
    contest = compete({RUNNER: partial(_runner, folder, *common), HAND: partial(_bare, *common)}, scale.turns(5))
    speeds = {name: [batch * context / cost for cost in costs] for name, costs in contest.costs.items()}
    for name, values in speeds.items():
        result.values.append(Value(name, Spread.of(values), "tokens/s"))
    result.aim("tokens per second, runner / bare loop", Contest(speeds).ratio(RUNNER, HAND), 0.99, at_least=True)
    waits = float((max(folder.glob("runs/*/waits"), key=lambda path: path.stat().st_mtime)).read_text())
    result.aim("waits for the device in five updates", Spread(waits, waits, waits), 0, "calls")
    return result


def _runner(folder: Path, shape: dict[str, int], context: int, batch: int, updates: int, compiled: bool) -> float:
    last = updates - 1 if updates < 20 else 49  # five updates after which nothing is logged
    return drive(
        folder,
        *("data=python_docs", "callbacks=[ema]", "checkpoint=at_end", "trainer.clip_norm=null"),
        *(f"data.datasets.train.context_length={context}", f"+data.datasets.train.stride={context // 4}"),
        *(f"data.batch_size={batch}", f"trainer.max_updates={updates}", "trainer.precision=bfloat16"),
        *(f"trainer.compile={compiled}", *(f"model.{name}={value}" for name, value in shape.items())),
        more={"callbacks.profiled": {"_target_": f"{__name__}.Profiled", "first": last - 5, "last": last}},
    ).bare


def _bare(shape: dict[str, int], context: int, batch: int, updates: int, compiled: bool) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = PythonDocs("train", context, stride=context // 4)
    model = Gpt(data.input_shape, data.output_shape, **shape).to(device)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    start = perf_counter()
    for rows in torch.randperm(len(data))[: batch * updates].split(batch):
        inputs, targets = (part[rows].to(device, non_blocking=True) for part in (data.inputs, data.targets))
        with torch.autocast(device.type, torch.bfloat16):
            loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss.item()
    return (perf_counter() - start) / updates
