"""What an update of two examples costs, DistilBERT with dynamic padding and a ViT with mixup, beside loops by hand."""

import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from .driver import drive
from .machine import is_installed
from .measure import Scale, compete
from .result import Result

EXAMPLES = Path(__file__).parents[2] / "examples"
OVERRIDES = ("callbacks=[]", "checkpoint=at_end", "schedule=cosine", "trainer.accumulation_steps=1", "name=null")


def measure(scale: Scale, folder: Path) -> Result:
    result = Result("Update of the examples distilbert and mixup_vit (one thread, all defaults, no evaluation)")
    if not is_installed("transformers"):
        result.notes.append("skipped: transformers is not installed (pip install --group examples)")
        return result
    updates = scale.pick(200, 3)
    for name, by_hand in (("distilbert", _distilbert), ("mixup_vit", _mixup_vit)):
        hand, runner = f"{name}: loop by hand", f"{name}: this runner"
        with _inside(EXAMPLES / name):
            contestants: dict[str, Callable[[], float]] = {
                hand: partial(by_hand, updates),
                runner: partial(_runner, folder, name, updates),
            }
            contest = compete(contestants, scale.turns(7))
        result.add_contest(contest, "ms")
        result.aim(f"{runner} / by hand", contest.ratio(runner, hand), 1.0)
    return result


@contextmanager
def _inside(example: Path) -> Iterator[None]:
    """Compose and import as a command in this folder does."""
    sys.path.insert(0, str(example))
    try:
        with chdir(example):
            yield
    finally:
        sys.path.remove(str(example))


def _runner(folder: Path, name: str, updates: int) -> float:
    length = ("trainer.max_epochs=null", f"trainer.max_updates={updates}")
    return drive(folder, f"experiment={name}", *OVERRIDES, *length).bare


def _train(
    model: nn.Module, loss: nn.Module, loader: DataLoader[Any], take: Callable[[Any], tuple[Any, Tensor]], updates: int
) -> float:
    """Train as a good engineer does by hand, with clipping and a schedule; return seconds per update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    start, done = perf_counter(), 0
    while done < updates:
        for batch in loader:
            inputs, targets = take(batch)
            value = loss(model(inputs), targets)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done % 10 == 0:
                value.item()  # logged
            if done == updates:
                break
    return (perf_counter() - start) / updates


def _distilbert(updates: int) -> float:
    import distilbert
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes: dict[str, Any] = {"vocab_size": 100, "max_position_embeddings": 32, "dim": 32, "hidden_dim": 64}
    more: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "seq_classif_dropout": 0.1, "initializer_range": 0.2}
    model = distilbert.Classifier(DistilBertForSequenceClassification(DistilBertConfig(**sizes, **more)))
    model.train()
    data = distilbert.Reviews(256, 0)
    loader = DataLoader(data, 16, shuffle=True, drop_last=True, collate_fn=distilbert.pad)

    def take(batch: Any) -> tuple[Any, Tensor]:
        return {key: batch[key] for key in ("input_ids", "attention_mask")}, batch["labels"]

    return _train(model, nn.CrossEntropyLoss(), loader, take, updates)


def _mixup_vit(updates: int) -> float:
    import mixup_vit

    from ksuit_runner.data.digits import Digits

    data = torch.utils.data.Subset(Digits("train"), range(640))
    model = mixup_vit.tiny_vit((1, 8, 8), (10,))
    model.train()
    loader = DataLoader(data, 64, shuffle=True, drop_last=True, collate_fn=_mixed)
    return _train(model, nn.CrossEntropyLoss(label_smoothing=0.1), loader, tuple, updates)


def _mixed(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Mixup, which a loop by hand has in its collate function as well."""
    inputs, targets = default_collate(samples) if isinstance(samples, list) else samples
    share = float(np.random.beta(0.8, 0.8))
    targets = nn.functional.one_hot(targets, 10).float()
    return inputs * share + inputs.roll(1, 0) * (1 - share), targets * share + targets.roll(1, 0) * (1 - share)
