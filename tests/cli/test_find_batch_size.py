"""The least number of parts of a batch that fits into memory is found by real runs."""

import os

import pytest
from hydra.core.global_hydra import GlobalHydra

from ksuit_runner.cli.dispatch import _main
from ksuit_runner.cli.find_batch_size import is_out_of_memory, least_that_fits
from ksuit_runner.errors import ConfigError, LostRankError

LIMITED = """
import os
from weakref import ref

import torch
from torch import nn

made = []


class Limited(nn.Linear):
    '''Has the memory for so many samples, one less once the optimizer has a state; for others in an evaluation.'''

    def __init__(self, most, most_evaluated=999):
        super().__init__(64, 10)
        assert not any(model() for model in made), "an earlier trial is still in memory"
        made.append(ref(self))
        self.most, self.before, self.most_evaluated = most, self.weight.detach().clone(), most_evaluated

    def forward(self, inputs):
        is_later = not torch.equal(self.before, self.weight)
        if len(inputs) > (self.most - is_later if self.training else self.most_evaluated):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 EiB")
        if os.environ.get("BROKEN"):
            raise ZeroDivisionError("broken")
        return super().forward(inputs.flatten(1))
"""


CHOICE = """
_target_: limited.Limited
most: 99
most_evaluated: 999
"""


@pytest.fixture
def ksuit(tmp_path, monkeypatch):
    (tmp_path / "limited.py").write_text(LIMITED)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "limited.yaml").write_text(
        "_target_: limited.Limited\nmost: 99\nmost_evaluated: 999\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        GlobalHydra.instance().clear()
        return _main(["find_batch_size", "model=limited", "data.num_workers=0", "default_callbacks=none", *overrides])

    return call


@pytest.mark.parametrize(("step", "most"), [(1, 64), (2, 64), (3, 100), (1, 1), (4, 6)])
def test_the_least_number_of_parts_is_found_in_few_steps(step, most):
    for threshold in range(1, most + step + 1):
        tried = {parts: parts >= threshold for parts in range(step, most + 1, step)}
        left = dict(tried)
        found = least_that_fits(left.pop, step, most)  # each number once, and multiples of the step only
        assert found == next((parts for parts, does_fit in tried.items() if does_fit), None)
        assert len(tried) - len(left) <= 12


def test_short_runs_find_what_fits(ksuit, tmp_path, capsys):
    evaluation = ["model.most_evaluated=100", "data.eval_batch_size=256", "+callbacks.accuracy.batch_size=140"]
    callbacks = "callbacks=[ema,accuracy,best_checkpoint,test_loss]"
    assert ksuit("model.most=23", "data.batch_size=64", callbacks, *evaluation) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "trainer.accumulation_steps=1, parts of 64 samples: out of memory",
        "trainer.accumulation_steps=2, parts of 32 samples: out of memory",
        "trainer.accumulation_steps=4, parts of 16 samples: fits",
        "trainer.accumulation_steps=3, parts of 22 samples: fits",
        "the largest that fits: 22 samples at once. Write trainer.accumulation_steps=3",
        "evaluations in batches of 256 samples: out of memory",
        "evaluations in batches of 128 samples: out of memory",
        "evaluations in batches of 64 samples: fits. Write callbacks.accuracy.batch_size=64 data.eval_batch_size=64",
    ]
    assert set(os.listdir(tmp_path)) <= {"conf", "limited.py", "__pycache__"}  # nothing is left


def test_other_outcomes_are_said(ksuit, capsys, monkeypatch):
    assert ksuit() == 0
    assert "the whole batch of 64 samples fits; for more of them: find_batch_size=true data.batch_size=128" in (
        capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match=r"data\.batch_size: not even a part of a single sample fits"):
        ksuit("model.most=0", "data.batch_size=2")
    with pytest.raises(ConfigError, match="trainer: the run has no updates to try out"):
        ksuit("trainer.max_epochs=0")
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(ZeroDivisionError):
        ksuit()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("OutOfMemoryError: MPS backend out of memory"), True),  # of a rank, as text
        (LostRankError("rank 1 was killed (out of memory (SIGKILL))"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_mistakes_come_before_any_trial(ksuit, monkeypatch):
    with pytest.raises(ConfigError, match="find_batch_size=yes: write find_batch_size=true"):
        _main(["find_batch_size=yes"])
    with pytest.raises(ConfigError, match=r"optimizer\.l: .* Did you mean 'lr'"):
        ksuit("+optimizer.l=1")
    with pytest.raises(ConfigError, match="optimzer: .* Did you mean 'optimizer'"):
        ksuit("+optimzer.lr=1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE has started 2: ranks=N"):
        ksuit()
