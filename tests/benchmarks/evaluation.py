"""The accuracy on a dataset, beside the plain evaluation loop."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import TensorDataset as TorchTensorDataset

from callbacks.accuracy import Accuracy
from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter

from . import hand_loops
from .driver import NO_CALLBACKS, drive
from .measure import Contest, Scale, compete, seconds_of
from .result import Result

BATCH = 512
RUNNER, HAND = "callback accuracy", "plain loop by hand"


class Rivals(CallbackBase):
    """Lets the accuracy callback and the plain loop take turns, within a run and before its training."""

    def __init__(self, turns: int, repeats: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.turns = turns
        self.repeats = repeats

    def _before_training(self, update_counter: UpdateCounter) -> None:
        accuracy = Accuracy(
            dataset_key="train",
            every_n_epochs=1,
            trainer=self.trainer,
            model=self.model,
            data_container=self.data_container,
            tracker=self.tracker,
            log_writer=self.writer,
            checkpoint_writer=self.checkpoint_writer,
            metric_property_provider=self.metric_property_provider,
        )

        def by_callback() -> None:
            for _ in range(self.repeats):
                accuracy.evaluate(update_counter)
                self.writer.discard()  # else it would be logged twice at this update

        contestants = {RUNNER: seconds_of(by_callback), HAND: seconds_of(self._by_hand(self.model.module))}
        contest = compete(contestants, self.turns)
        (self.path_provider.run_dir / "rivals.json").write_text(json.dumps(contest.costs))

    def _by_hand(self, model: nn.Module) -> Any:
        dataset = self.data_container.datasets["train"]
        loader = DataLoader(TorchTensorDataset(dataset.inputs, dataset.targets), BATCH)

        def evaluate() -> None:
            for _ in range(self.repeats):
                hand_loops.accuracy(model, loader)

        return evaluate


def measure(scale: Scale, folder: Path) -> Result:
    result = Result(f"Evaluation: accuracy of a perceptron on 1,438 digits, in batches of {BATCH}")
    rivals = {"_target_": f"{__name__}.Rivals", "turns": scale.turns(15), "repeats": scale.pick(20, 1)}
    options = (
        "model=mlp",
        f"data.eval_batch_size={BATCH}",
        "trainer.max_updates=1",
        "tracker=noop",
        "trainer.device=cpu",
    )
    driven = drive(folder, *NO_CALLBACKS, *options, more={"callbacks.rivals": rivals})
    contest = Contest(json.loads((driven.paths.run_dir / "rivals.json").read_text()))
    repeats = {name: [cost / rivals["repeats"] for cost in costs] for name, costs in contest.costs.items()}
    result.add_contest(Contest(repeats), "ms")
    result.aim("callback / by hand", contest.ratio(RUNNER, HAND), 1.0)
    return result
