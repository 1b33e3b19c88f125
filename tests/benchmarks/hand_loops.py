"""The loops that a good engineer writes by hand: the fastest one, a plain one, and one with what a run needs."""

from time import perf_counter

import mlflow
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from .small_task import BATCH_SIZE, DECAY, LOG_EVERY, SmallTask


def floor(task: SmallTask) -> float:
    """Train with the least that an update needs; return seconds per update."""
    model = task.model()
    optimizer = task.optimizer(model, fused=True)
    inputs, targets = task.train
    start = perf_counter()
    for _ in range(task.epochs):
        order = torch.randperm(len(inputs))
        for rows in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            cross_entropy(model(inputs.index_select(0, rows)), targets.index_select(0, rows)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return (perf_counter() - start) / task.updates


def plain(task: SmallTask) -> float:
    """Train as tutorials do, without anything around it; return seconds per update."""
    model = task.model()
    optimizer = task.optimizer(model)
    loader, _ = task.loaders()
    start = perf_counter()
    for _ in range(task.epochs):
        for inputs, targets in loader:
            loss = cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (perf_counter() - start) / task.updates


def equipped(task: SmallTask, fused: bool | None = None) -> float:
    """Train with metrics in MLflow, averaged weights, evaluation and checkpoints; return seconds per update."""
    model = task.model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimizer = task.optimizer(model, fused=fused)
    schedule = CosineAnnealingLR(optimizer, task.updates)
    loader, test_loader = task.loaders()
    mlflow.set_tracking_uri(task.uri)
    mlflow.set_experiment("by hand")
    with mlflow.start_run():
        start, update = perf_counter(), 0
        for epoch in range(task.epochs):
            model.train()
            for inputs, targets in loader:
                loss = cross_entropy(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                average.update_parameters(model)
                update += 1
                if update % LOG_EVERY == 0:
                    rate = schedule.get_last_lr()[0]
                    mlflow.log_metrics({"loss": loss.item(), "learning_rate": rate}, step=update)
            found = {"accuracy": accuracy(model, test_loader), "accuracy_ema": accuracy(average, test_loader)}
            mlflow.log_metrics(found, step=update)
            parts = {"model": model, "ema": average, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "epoch": epoch}, task.folder / f"by_hand_{epoch % 2}.pt")
        return (perf_counter() - start) / update


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Evaluate as tutorials do."""
    model.eval()
    hits = count = 0
    for inputs, targets in loader:
        hits += (model(inputs).argmax(1) == targets).sum().item()
        count += len(targets)
    return hits / count
