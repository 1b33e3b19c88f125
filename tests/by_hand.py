"""Updates of a trainer like those of the loop, without hooks."""

from functools import partial

import torch

from ksuit_runner.keyed_random import keyed

SGD = partial(torch.optim.SGD, lr=1.0)
BATCH = (torch.linspace(-1, 1, 20).reshape(5, 4), torch.tensor([0, 1, 2, 1, 0]))


def gradients(trainer, batch=BATCH):
    for part, share in trainer.parts(batch):
        losses, _ = trainer.forward(part)
        trainer.backward(losses, share)
    trainer.complete_gradients()
    return {name: parameter.grad.clone() for name, parameter in trainer.model.module.named_parameters()}


def train(trainer, updates=None):
    """Run the updates like the loop, without hooks; return the size of each batch."""
    sizes = []
    trainer.data_container.open(trainer.counter)
    with keyed(0):
        while not trainer.counter.is_finished and trainer.counter.update != updates:
            [part] = trainer.data_container.next_training_batch()
            batch = part.batch
            sizes.append(trainer.batch_size(batch))
            gradients(trainer, batch)
            trainer.step()
            trainer.counter.update += 1
    trainer.data_container.close()
    return sizes


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.tensors().items()}
