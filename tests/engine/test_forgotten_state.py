"""State that updates change and no checkpoint holds: a warning names it, and nothing else is warned of."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD

from callbacks.loss import Loss
from ksuit_runner import SgdTrainer
from ksuit_runner.models.linear import Linear
from ksuit_runner.testing import tiny_run


class Baseline(SgdTrainer):
    """Scales its loss by a running mean, and keeps what a step needs for that step only."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.baseline, self.parts, self.constant = torch.tensor(1.0), [], {"a": [1, 2.0]}

    def training_step(self, batch, model):
        inputs, targets = batch
        outputs = model(inputs)
        loss = self.loss(outputs, targets)
        if model.training:
            self.parts.append(loss.detach())
        return loss / self.baseline, outputs

    def step(self, *args):
        super().step(*args)
        self.baseline = self.baseline.lerp(self.parts.pop(), 0.1)


class Stored(Baseline):
    def extra_state(self):
        return {"baseline": self.baseline}

    def load_extra_state(self, state):
        self.baseline = state["baseline"]


class Annealed(nn.Module):
    """Counts its steps where a checkpoint does not see it."""

    def __init__(self):
        super().__init__()
        self.layer, self.steps, self.last, self.label = Linear((1, 8, 8), (10,)), 0, None, "annealed"
        self.register_buffer("seen", torch.tensor(0))
        self.rnn = nn.GRU(10, 10)  # holds its parameters in a list of its own

    def forward(self, inputs):
        self.steps += self.training
        self.seen += 1
        self.last = self.layer(inputs)  # with a graph: to be looked at
        return self.rnn(self.last.unsqueeze(0))[0].squeeze(0) * (1 + 1 / self.steps if self.steps else 1)


class Tied(nn.Module):
    """Holds its weights and buffers elsewhere as well, a number in its state_dict, and the shape of the last batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.counting, self.shape = nn.Linear(64, 10), Counting(), ()
        self.register_buffer("queue", torch.zeros(4))
        self.weight, self.queues = self.layer.weight.data, {"first": [self.queue[:2]]}

    def forward(self, inputs):
        self.queue += 1
        self.shape = tuple(inputs.shape)
        return self.counting(self.layer(inputs.flatten(1)))


class Counting(nn.Module):
    count = 0

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "count"] = torch.tensor(self.count)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.count = int(state_dict.pop(prefix + "count"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, inputs):
        self.count += self.training
        return inputs


class WithList(SGD):
    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.all = [item for group in self.param_groups for item in group["params"]]


class AnnealedLoss(nn.CrossEntropyLoss):
    temperature = 2.0

    def forward(self, outputs, targets):
        self.temperature *= 0.9
        return super().forward(outputs / self.temperature, targets)


class Warming(SGD):
    count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)


CASES = {
    "trainer": ({"trainer_class": Baseline}, ["trainer: updates change 'baseline' of a Baseline, .* by extra_state"]),
    "stored": ({"trainer_class": Stored}, []),
    "module": (
        {"module": Annealed(), "loss": AnnealedLoss()},
        [
            r"model: updates change 'steps' of an Annealed, which no checkpoint .* exact\. Then make it a buffer",
            "loss: updates change 'temperature' of an AnnealedLoss",
        ],
    ),
    "optimizer": (
        {"optimizer": partial(Warming, lr=0.1)},
        ["optimizer: updates change 'count' of a Warming, .* state"],
    ),
    "stored elsewhere": ({"module": Tied(), "optimizer": partial(WithList, lr=0.1)}, []),
    "plain": ({"accumulation_steps": 3, "clip_norm": 1.0, "optimizer": partial(torch.optim.AdamW)}, []),
}

CALLBACKS = {"loss": partial(Loss, dataset_key="test", every_n_updates=2)}  # of batches of another size


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("begins", [0, 4])
def test_what_is_forgotten_is_named_once(tmp_path, caplog, case, begins):
    given, messages = CASES[case]
    if begins:
        tiny_run(tmp_path, CALLBACKS, max_updates=8, stop_at=begins, **given).train()
        caplog.clear()
    tiny_run(tmp_path, CALLBACKS, max_updates=8, **given).train()
    found = [record.getMessage() for record in caplog.records if "no checkpoint holds" in record.getMessage()]
    assert len(found) == len(messages), found
    for message, pattern in zip(found, messages, strict=True):
        assert re.match(pattern, message), message
