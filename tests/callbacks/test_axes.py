from functools import partial

from callbacks.axes import Axes
from callbacks.learning_rate import LearningRate
from callbacks.train_loss import TrainLoss


def test_every_point_has_its_epoch_and_its_sample(new_run):
    callbacks = {
        "axes": Axes,
        "rate": partial(LearningRate, every_n_updates=15),
        "loss": partial(TrainLoss, every_n_updates=10),
    }
    run = new_run(callbacks, max_updates=30, batch_size=100, drop_last=True).train()  # of 1438 samples
    assert run.metric("epoch") == {10: 10 / 14, 15: 15 / 14, 20: 20 / 14, 30: 30 / 14}
    assert run.metric("sample") == {10: 1000, 15: 1500, 20: 2000, 30: 3000}
