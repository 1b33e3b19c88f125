"""The Trainer of Hugging Face, as its documentation has it: TrainingArguments, its own MLflow callback, metrics."""

import os
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from .mlflow_store import end_runs
from .small_task import BATCH_SIZE, DECAY, LEARNING_RATE, LOG_EVERY, TEST_BATCH_SIZE, SmallTask


class Rows(Dataset):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(inputs)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Clock(transformers.TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.stop = perf_counter()


class Ema(transformers.TrainerCallback):
    """The averaged weights, which the Trainer itself has none of."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.average.update_parameters(model)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.save(self.average.state_dict(), os.path.join(args.output_dir, "ema.pt"))


def train(task: SmallTask) -> float:
    """Return seconds per update."""
    os.environ.update(MLFLOW_TRACKING_URI=task.uri, MLFLOW_EXPERIMENT_NAME="transformers")
    clock = Clock()
    arguments = transformers.TrainingArguments(
        output_dir=str(task.folder / "transformers"),
        num_train_epochs=task.epochs,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=TEST_BATCH_SIZE,
        dataloader_drop_last=False,
        learning_rate=LEARNING_RATE,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        logging_steps=LOG_EVERY,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        report_to=["mlflow"],
        use_cpu=True,
    )
    rows = len(task.train[0]) // BATCH_SIZE * BATCH_SIZE  # an evaluation has no batches to leave out
    trainer = transformers.Trainer(
        model=Classifier(task.model()),
        args=arguments,
        train_dataset=Rows(task.train[0][:rows], task.train[1][:rows]),
        eval_dataset=Rows(*task.test),
        compute_metrics=_accuracy,
        callbacks=[Ema(), clock],
    )
    trainer.train()
    assert trainer.state.global_step == task.updates
    end_runs()
    return (clock.stop - clock.start) / task.updates


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
