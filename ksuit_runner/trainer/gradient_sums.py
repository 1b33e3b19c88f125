"""The gradients of a batch that is computed in parts: by one process after the other part, or by several ranks."""

from collections.abc import Iterator, Sequence
from math import ceil, log2

import torch
from torch import Tensor

from ksuit_runner.distributed.part_tree import Node, PartTree
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.tensors.foreach import accumulate_all, multiply_all
from ksuit_runner.trainer.batch_gradients import Backward
from ksuit_runner.trainer.losses import Losses
from ksuit_runner.trainer.part_buffers import PartBuffers
from ksuit_runner.trainer.parts import WeighedPart

Values = list[Tensor | None]
"""Gradients of all parameters for each slot, then what buffers have changed by; None where there is nothing."""


class GradientSums:
    """Turns what the parts of a batch have computed into gradients, buffers and loss of the whole batch.

    A loss of the whole batch is the sum over its parts of weight times mean, divided by the sum of the weights, which
    nobody knows before the ranks have met. So the gradients of weight times mean are summed up, in the order of
    ``PartTree``, and divided at the end: the result depends on the number of parts, and not on who computes them.
    Meanwhile all are divided by a power of two of about the size of a batch, which changes no bit.

    Where the parameters themselves are spread over the ranks, these add up gradients in their backward passes. Then all
    of them do as many passes, and those of parts that do not count are worth nothing.

    The weight of a loss is its count if the training step says it, and else that of the part. Losses with different
    weights have a slot each, with sums and a backward pass of its own; mostly there is one.

    Args:
        parameters: What gradients are with respect to.
        backward: Does the backward pass of a loss.
        strategy: How the ranks add up what they have.
        parts: Number of parts of a batch.
        batch_size: Samples per update.
        names: The losses whose sum is minimized, see ``Losses.summands``; the same in every update.
        are_sums: Whether the losses are sums over the samples, and not means.
        buffers: The buffers that training changes.

    Attributes:
        total, has_logged, needs_all_passes: See ``BatchGradients``.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        backward: Backward,
        strategy: Strategy,
        parts: int,
        batch_size: int,
        names: Sequence[str],
        are_sums: bool,
        buffers: PartBuffers,
    ) -> None:
        self._parameters = parameters
        self._backward = backward
        self._strategy = strategy
        self._parts = parts
        self._scale = 2.0 ** ceil(log2(batch_size))
        self._slots = {name: number for number, name in enumerate(names, 1)} if len(names) > 1 else {names[0]: 0}
        self._slot_count = 1 + max(self._slots.values())
        self.needs_all_passes = strategy.is_sharded
        self._are_sums = are_sums
        self._keeps_loss = False
        self._buffers = buffers
        self.total = torch.zeros(())
        self.has_logged = False
        self._like: Sequence[Tensor] | None = None
        self.start((), 0)

    def start(self, computed: Sequence[WeighedPart], left_out: int) -> None:
        """Start with a batch.

        Args:
            computed: Its parts that are computed here.
            left_out: How many of this rank's parts are not computed because they have nothing of the loss.
        """
        self._last = computed[-1].number if computed else -1
        self._left_out = left_out
        self.start_again()

    def start_again(self) -> None:
        """Start with the same batch again."""
        self._buffers.start()
        if (like := self._buffers.like()) is not self._like:
            self._like = like
            self._strategy.bind([*self._parameters] * self._slot_count + [*like])
        self._tree = PartTree[Values](1 if self.needs_all_passes else self._parts, _add)
        self._left = list(self._strategy.world.own(self._parts))
        self._forwarded = 0
        self._empty = [0.0] * self._slot_count  # how many parts have nothing of a loss
        self._empty[0] += self._left_out
        self._weights = [0.0] * (self._slot_count * self._parts)
        self._losses = [0.0] * (self._slot_count * self._parts * self._keeps_loss)

    def keep_loss(self) -> None:
        """Keep the loss of the whole batch from now on; between two batches."""
        self._keeps_loss = True
        self.start_again()

    def begin(self) -> None:
        """Begin with the forward pass of a part: all of them find the buffers as they were before the update."""
        if self._forwarded:
            self._buffers.reset()
        self._forwarded += 1

    def counted(self, losses: Losses, weight: float) -> Tensor | None:
        """Return the sum of those losses of which a part has something, detached; None if there are none."""
        losses.read_counts()
        terms = [term.detach() for _, term, count in self._terms(losses, weight) if count]
        return torch.stack(terms).sum() if terms else None

    def add(self, part: WeighedPart, losses: Losses, update: int) -> None:
        """Compute the gradients of a part, in the update after so many updates."""
        terms: dict[int, Tensor] = {}
        for slot, term, count in self._terms(losses, part.weight):
            if not count:
                self._empty[slot] += 1
                if not self.needs_all_passes:
                    continue
                term = self._strategy.nothing(term)
            place = part.number * self._slot_count + slot
            self._weights[place] = float(count)
            if self._keeps_loss:
                self._losses[place] += float(count) * term.item()
            if term.requires_grad:  # not of what is frozen
                terms[slot] = terms[slot] + term if slot in terms else term
        node, before = self._pop(part.number)
        values = before or self._nothing()
        for left, (slot, term) in zip(reversed(range(len(terms))), terms.items(), strict=True):
            self._hold(values, slot)
            factor = 1.0 if self._are_sums else self._weights[part.number * self._slot_count + slot] / self._scale
            self._strategy.before_backward(part.number == self._last or self._slot_count > 1)
            self._backward(term if factor == 1.0 else term * factor, update, left > 0)
            values[self._places(slot)] = [parameter.grad for parameter in self._parameters]
        changes = self._places(self._slot_count)
        values[changes] = _add(values[changes], self._buffers.changes())
        self._left.remove(part.number)
        merged = self._tree.put(node, values)
        if merged is not values:  # let go of what has been added
            self._hold(merged, next(iter(terms), 0))

    def finish(self, word: UpdateWord, bad_loss: float, has_logged: bool) -> float:
        """Let the ranks add up what they have, and leave the gradients and buffers of the whole batch in place.

        Args:
            word: What this rank has to say besides; then what all have said.
            bad_loss: The sum of this rank's non-finite losses, or 0.
            has_logged: Whether this rank's training steps have logged something.

        Returns:
            The sum of the non-finite losses of all ranks, or 0. It is NaN if the whole batch has nothing of a loss:
            the mean over nothing.
        """
        for part in range(not self._tree.nodes) if self.needs_all_passes else self._left:
            self._tree.put(Node(0, part), self._nothing())
        word.said += has_logged
        word.numbers = [bad_loss, float(has_logged), self._forwarded, *self._empty, *self._weights, *self._losses]
        total, sums = self._strategy.reduce(self._tree.nodes, self._parts, word.encode())
        word.take(sums)
        bad_loss, logged, forwarded, *rest = word.numbers
        self.has_logged = bool(logged)
        empty, rest = rest[: self._slot_count], rest[self._slot_count :]
        weights = [sum(rest[slot : len(self._weights) : self._slot_count]) for slot in range(self._slot_count)]
        if self._keeps_loss:
            losses = rest[len(self._weights) :]
            by_slot = [sum(losses[slot :: self._slot_count]) for slot in range(self._slot_count)]
            divisors = [1.0 if self._are_sums else weight for weight in weights]
            means = [loss / weight for loss, weight in zip(by_slot, divisors, strict=True) if weight]
            self.total = torch.tensor(sum(means))
        self._leave(total, weights)
        if forwarded:
            self._buffers.apply(total[self._places(self._slot_count)], int(forwarded))
        has_nothing = any(count and not weight for count, weight in zip(empty, weights, strict=True))
        self.start_again()
        return bad_loss + float("nan") if has_nothing else bad_loss

    def _leave(self, total: Values, weights: Sequence[float]) -> None:
        """Leave the gradients at the parameters, those of all slots together."""
        for parameter in self._parameters:
            parameter.grad = None
        for slot, weight in enumerate(weights):
            gradients = total[self._places(slot)]
            held = [gradient for gradient in gradients if gradient is not None]
            if held and weight and not self._are_sums and weight != self._scale:
                multiply_all(self._strategy.local(held), self._scale / weight)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _terms(self, losses: Losses, weight: float) -> Iterator[tuple[int, Tensor, float]]:
        """Yield the slot, the value and the weight of each loss that is minimized."""
        for name, term in losses.summands.items():
            count = losses.counts.get(name)
            yield (0, term, weight) if count is None else (self._slots[name], term, float(count))

    def _pop(self, part: int) -> tuple[Node, Values | None]:
        """Return what the gradients of a part are added to, and where the sum belongs."""
        if self.needs_all_passes:
            return Node(0, 0), self._tree.nodes.pop(Node(0, 0), None)
        return self._tree.pop_left(part)

    def _nothing(self) -> Values:
        return [None] * (self._slot_count * len(self._parameters) + self._buffers.count)

    def _places(self, slot: int) -> slice:
        """Return where the gradients of a slot are among the values; after the last slot those of the buffers."""
        start = slot * len(self._parameters)
        return slice(start, start + len(self._parameters) if slot < self._slot_count else None)

    def _hold(self, values: Values, slot: int) -> None:
        """Let the parameters hold the sums of a slot, to which a backward pass adds."""
        for parameter, gradient in zip(self._parameters, values[self._places(slot)], strict=True):
            parameter.grad = gradient


@torch.no_grad()
def _add(left: Values, right: Values) -> Values:
    """Add the values of a right neighbour to those of a left one, in place where both are dense."""
    values = [other if one is None else one for one, other in zip(left, right, strict=True)]
    both = [
        (place, one, other)
        for place, (one, other) in enumerate(zip(left, right, strict=True))
        if one is not None and other is not None
    ]
    dense = [(one, other) for _, one, other in both if one.layout == other.layout == torch.strided]
    if dense:
        accumulate_all(*map(list, zip(*dense, strict=True)))
    for place, one, other in both:
        if not one.layout == other.layout == torch.strided:
            values[place] = other + one if one.is_sparse and not other.is_sparse else one + other
    return values
