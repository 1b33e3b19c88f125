"""Lightning, as its documentation has it: a LightningModule, its own MLflow logger and its own callbacks."""

import warnings
from time import perf_counter
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from torch.nn.functional import cross_entropy

from .small_task import DECAY, LOG_EVERY, SmallTask


class Classifier(lightning.LightningModule):
    def __init__(self, task: SmallTask) -> None:
        super().__init__()
        self.task = task
        self.model = task.model()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        loss = cross_entropy(self.model(inputs), targets)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        accuracy = (self.model(inputs).argmax(1) == targets).float().mean()
        self.log("accuracy", accuracy, batch_size=len(targets))

    def configure_optimizers(self) -> Any:
        optimizer = self.task.optimizer(self)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.task.updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Clock(lightning.Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.stop = perf_counter()


def train(task: SmallTask) -> float:
    """Return seconds per update."""
    clock = Clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as advice about data workers
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=task.epochs,
            logger=MLFlowLogger("lightning", tracking_uri=task.uri),
            log_every_n_steps=LOG_EVERY,
            callbacks=[
                EMAWeightAveraging(decay=DECAY),
                LearningRateMonitor("step"),
                ModelCheckpoint(task.folder / "lightning", every_n_epochs=1),
                clock,
            ],
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(task), *task.loaders())
    assert trainer.global_step == task.updates
    return (clock.stop - clock.start) / task.updates
