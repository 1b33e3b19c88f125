"""Ignite, as its documentation has it: supervised trainer and evaluator, and a handler for everything else."""

from time import perf_counter

from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import (
    Checkpoint,
    DiskSaver,
    EMAHandler,
    LRScheduler,
    MLflowLogger,
    ProgressBar,
    global_step_from_engine,
)
from ignite.metrics import Accuracy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from .mlflow_store import end_runs
from .small_task import DECAY, LOG_EVERY, SmallTask


def train(task: SmallTask) -> float:
    """Return seconds per update."""
    model = task.model()
    optimizer = task.optimizer(model)
    loader, test_loader = task.loaders()
    trainer = create_supervised_trainer(model, optimizer, cross_entropy)
    schedule = LRScheduler(CosineAnnealingLR(optimizer, task.updates))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, schedule)
    ema = EMAHandler(model, momentum=1 - DECAY)
    ema.attach(trainer)
    ProgressBar().attach(trainer)
    logger = MLflowLogger(tracking_uri=task.uri)
    every = Events.ITERATION_COMPLETED(every=LOG_EVERY)
    logger.attach_output_handler(trainer, every, tag="train", output_transform=lambda loss: {"loss": loss})
    logger.attach_opt_params_handler(trainer, every, optimizer=optimizer)
    evaluators = {"live": model, "ema": ema.ema_model}
    for name, evaluated in evaluators.items():
        _evaluate(trainer, evaluated, test_loader, logger, name)
    _keep_checkpoints(trainer, {"model": model, "ema": ema.ema_model, "optimizer": optimizer}, task)
    start = perf_counter()
    trainer.run(loader, max_epochs=task.epochs)
    seconds = perf_counter() - start
    assert trainer.state.iteration == task.updates
    logger.close()
    end_runs()
    return seconds / task.updates


def _evaluate(trainer: Engine, model: nn.Module, loader: DataLoader, logger: MLflowLogger, name: str) -> None:
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()})
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(loader))
    step = global_step_from_engine(trainer, Events.ITERATION_COMPLETED)
    logger.attach_output_handler(evaluator, Events.COMPLETED, tag=name, metric_names="all", global_step_transform=step)


def _keep_checkpoints(trainer: Engine, parts: dict[str, object], task: SmallTask) -> None:
    saver = DiskSaver(str(task.folder / "ignite"), create_dir=True, require_empty=False)
    handler = Checkpoint({**parts, "trainer": trainer}, saver, n_saved=2)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
