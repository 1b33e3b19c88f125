"""What an update costs where the model is all of it: a gpt of ten million parameters."""

from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch.nn.functional import cross_entropy

from ksuit_runner.data.python_docs import PythonDocs
from ksuit_runner.models.gpt import Gpt

from .driver import drive
from .measure import Scale, compete
from .result import Result

HAND, RUNNER = "loop by hand, fused AdamW", "this runner, all defaults"
HAND_EMA, RUNNER_EMA = f"{HAND}, EMA", f"{RUNNER}, EMA"


def measure(scale: Scale, folder: Path) -> Result:
    shape = scale.pick({"embed_dim": 384, "depth": 6, "num_heads": 6}, {"embed_dim": 32, "depth": 1, "num_heads": 2})
    updates = scale.pick(10, 3)
    parameters = sum(parameter.numel() for parameter in _model(shape).parameters())
    result = Result(f"Update of a gpt with {parameters / 1e6:.1f} M parameters (python_docs, batches of 8 x 64)")
    overrides = [f"model.{name}={value}" for name, value in shape.items()]
    run = partial(_runner, folder, updates, overrides)
    contestants = {
        HAND: partial(_by_hand, shape, updates),
        HAND_EMA: partial(_by_hand, shape, updates, decay=0.99),
        RUNNER: partial(run, ""),
        RUNNER_EMA: partial(run, "ema"),
    }
    contest = compete(contestants, scale.turns(9))
    result.add_contest(contest, "ms")
    result.aim("this runner / by hand", contest.ratio(RUNNER, HAND), 1.0)
    result.aim("the same with EMA", contest.ratio(RUNNER_EMA, HAND_EMA), 1.0)
    result.notes.append(f"with EMA / by hand without it: {contest.ratio(RUNNER_EMA, HAND).median:.3f} x")
    return result


def _model(shape: dict[str, int]) -> Gpt:
    data = PythonDocs("test")
    return Gpt(data.input_shape, data.output_shape, **shape)


def _by_hand(shape: dict[str, int], updates: int, decay: float | None = None) -> float:
    model, data = _model(shape), PythonDocs("train")
    weights = [parameter.detach() for parameter in model.parameters()]
    averages = [weight.clone() for weight in weights]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, fused=True)
    start = perf_counter()
    for rows in torch.randperm(len(data))[: 8 * updates].split(8):
        outputs = model(data.inputs[rows])
        cross_entropy(outputs.flatten(0, -2), data.targets[rows].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if decay is not None:
            torch._foreach_lerp_(averages, weights, 1 - decay)
    return (perf_counter() - start) / updates


def _runner(folder: Path, updates: int, overrides: list[str], callbacks: str) -> float:
    length = (f"trainer.max_updates={updates}", "data.batch_size=8", "trainer.clip_norm=null", "checkpoint=at_end")
    driven = drive(folder, "data=python_docs", f"callbacks=[{callbacks}]", *overrides, *length)
    return driven.bare
