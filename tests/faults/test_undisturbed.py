"""Callbacks that do not write to the model change no bit of the weights and no training loss."""

import pytest

GAMBLER = '''
"""Draws random numbers from every generator, and seeds them, in every hook."""

import random

import numpy as np
import torch
from ksuit_runner.engine.hooks import HOOKS
from ksuit_runner.callback_bases.periodic import PeriodicCallback


class Gambler(PeriodicCallback):
    pass


def _draw(self, **arguments):
    torch.rand(17), np.random.random(3), random.random()
    torch.manual_seed(int(torch.randint(99, ())))


for hook in (*HOOKS, "periodic_callback"):
    setattr(Gambler, f"_{hook}", _draw)
'''
VARIANTS = {
    "nothing": (
        *("callbacks=[]", "~callbacks.ema", "default_callbacks=none"),
        "+default_callbacks.train_loss._target_=callbacks.train_loss.TrainLoss",
    ),
    "in another order": ("callbacks=[best_checkpoint,loss,accuracy,ema]",),
    "all shipped callbacks": (
        "callbacks=[ema,accuracy,loss,best_checkpoint,best_loss,early_stop]",
        "callbacks.best_loss.tag=low",
    ),
    "evaluation at every update": ("~callbacks.accuracy.every_n_epochs", "+callbacks.accuracy.every_n_updates=1"),
    "a gambler": ("+callbacks.gambler={_target_: callbacks.gambler.Gambler, every_n_updates: 1}",),
    "data workers": ("data.num_workers=2",),
}


def seen(project):
    result = project.result()
    weights = result.files["E6_U54_S600/model.safetensors"]
    return weights, {step: value for (key, step), value in result.points.items() if key == "loss/train"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_callbacks_change_no_bit_of_training(project, template, reference, variant):
    project.clear(template)
    project.run()
    expected = seen(project)
    assert len(expected[1]) == 13
    (project.folder / "callbacks").mkdir(exist_ok=True)
    (project.folder / "callbacks" / "gambler.py").write_text(GAMBLER)
    given = VARIANTS[variant]
    callbacks = () if any(item.startswith("callbacks=") for item in given) else ("callbacks=[ema,accuracy,loss]",)
    project.clear(template)
    project.run("experiment=noisy", *callbacks, *given)
    assert seen(project) == expected
