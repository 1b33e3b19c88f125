"""Updates of a trainer like those of the loop, without hooks."""

from functools import partial

import torch

from ksuit_runner.data.batch_plan import cut
from ksuit_runner.data.fetch_batch import Part
from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.keyed_random import keyed, mix, seed_all
from ksuit_runner.trainer.parts import WeighedPart

SGD = partial(torch.optim.SGD, lr=1.0)
BATCH = (torch.linspace(-1, 1, 20).reshape(5, 4), torch.tensor([0, 1, 2, 1, 0]))

WHOLE = WeighedPart(BATCH, 0, 1.0)


def cut_by_rows(batch, parts):
    """Cut a batch of tensors as if it had been fetched in parts."""
    _, _, spans = cut(len(batch[0]), parts, range(parts))
    return [Part(tuple(rows[start:stop] for rows in batch), number, stop - start) for number, start, stop in spans]


def gradients(trainer, batch=BATCH):
    """Compute the gradients of a batch, or of its parts."""
    trainer.update.take_snapshot()
    parts = batch if isinstance(batch, list) else cut_by_rows(batch, trainer.accumulation_steps)
    for part in trainer.start_update(parts):
        seed_all(mix("by hand", trainer.counter.update, part.number))
        losses, _ = trainer.update.forward(part)
        if not trainer.update.leaves_out(losses, part):
            trainer.update.backward(losses, part)
    trainer.update.complete_gradients(UpdateWord())
    return {name: parameter.grad.clone() for name, parameter in trainer.model.module.named_parameters()}


def train(trainer, updates=None):
    """Run the updates like the loop, without hooks; return the size of each batch."""
    sizes = []
    trainer.data_container.open(trainer.counter, parts=trainer.accumulation_steps)
    with keyed(0):
        while not trainer.counter.is_finished and trainer.counter.update != updates:
            parts = trainer.data_container.next_training_batch()
            sizes.append(sum(part.samples for part in parts))
            gradients(trainer, parts)
            trainer.step()
            trainer.counter.update += 1
    trainer.data_container.close()
    return sizes


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.tensors().items()}
