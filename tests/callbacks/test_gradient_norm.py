from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from callbacks.gradient_norm import GradientNorm
from ksuit_runner.callback_base import CallbackBase


class Recorder(CallbackBase):
    """Computes the norm of an update's gradients itself."""

    def _track_after_accumulation_step(self, update_counter, batch, losses, outputs):
        with torch.enable_grad():
            parameters = list(self.model.parameters())
            gradients = torch.autograd.grad(cross_entropy(self.model(batch[0]), batch[1]), parameters)
        self.norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def test_the_norm_before_clipping_is_logged(new_run):
    callbacks = {"norm": partial(GradientNorm, every_n_updates=10), "recorder": Recorder}
    run = new_run(callbacks, clip_norm=1e-3, max_updates=10).train()
    assert run["recorder"].norm > 1e-2
    assert run.metric("gradient_norm") == {10: pytest.approx(run["recorder"].norm, rel=1e-5)}


def test_without_clipping_nothing_is_logged(new_run):
    assert new_run({"norm": partial(GradientNorm, every_n_updates=1)}, max_updates=3).train().metrics() == set()


class SkipsAllButTheFirst(CallbackBase):
    replaces_state = True

    def _before_every_optimizer_step(self, update_counter):
        if update_counter.update > 0:
            self.trainer.skip_update()


def test_a_resumed_run_knows_the_norm_of_the_last_step(new_run):
    callbacks = {"norm": partial(GradientNorm, every_n_updates=3), "skips": SkipsAllButTheFirst}
    reference = new_run(callbacks, "reference", clip_norm=1.0, max_updates=3).train().metric("gradient_norm")
    new_run(callbacks, clip_norm=1.0, max_updates=3, stop_at=2).train()
    assert new_run(callbacks, clip_norm=1.0, max_updates=3, strict=False).train().metric("gradient_norm") == reference
    assert list(reference) == [3]


def test_a_fork_that_does_not_clip_has_no_norm(new_run):
    clipped = new_run({}, clip_norm=1.0, max_updates=1).train().run.trainer
    fork = new_run({}, "fork", max_updates=2).run.trainer
    fork.load_state_dict(clipped.state_dict(), same_settings=False)
    assert clipped.grad_norm is not None and fork.grad_norm is None
