"""Optimizers whose step evaluates the loss again."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import ConfigError, LossError
from ksuit_runner.schedule import constant, cosine
from ksuit_runner.trainer.optimizer_specs import OptimizerSpec
from ksuit_runner.trainer.sgd import SgdTrainer

SEARCH = partial(LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


class Sharpness(SGD):
    """Steps with the gradients at a point nearby, after Foret et al., SAM, 2021."""

    def step(self, closure):
        for sign in (1, -1):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if sign == 1:
                        self.state[parameter]["way"] = 0.05 * parameter.grad.sign()
                    with torch.no_grad():
                        parameter.add_(self.state[parameter]["way"], alpha=sign)
            if sign == 1:
                closure()
        super().step()


class Counts(SgdTrainer):
    """Counts evaluations, and fails in one of them."""

    calls, broken, seen = 0, (), ()

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        if model.training:
            self.calls += 1
            self.seen = (*self.seen, losses["total"].item())
        return {"total": losses["total"] * (float("nan") if self.calls in self.broken else 1)}, outputs


class Hooks(CallbackBase):
    calls = 0

    def _before_every_optimizer_step(self, update_counter):
        self.calls += 1


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def options(optimizer, **more):
    given = {"model": make_model(), "optimizer": optimizer, "schedule": constant, "trainer_class": Counts}
    return {**given, "max_updates": 6, **more}


@pytest.mark.parametrize("optimizer", [SEARCH, partial(Sharpness, lr=0.1)], ids=["search", "sharpness"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_closure_is_exact_over_a_resume_and_fires_hooks_once(maker, bits, optimizer, steps):
    more = {"accumulation_steps": steps, "clip_norm": 1.0, "checkpoint": {"every_n_updates": 1, "keep_last": 9}}
    whole = maker.run({"hooks": (Hooks, {})}, **options(optimizer, **more))
    train(whole)
    train(maker.resumed({"hooks": (Hooks, {})}, update=3, **options(optimizer, **more)))
    ends = [read_newest(maker.paths(name)) for name in ("run00000", "run00000-resumed")]
    assert bits(ends[0].model) == bits(ends[1].model)
    assert bits(ends[0].state["trainer"]) == bits(ends[1].state["trainer"])
    assert ends[0].model["1.num_batches_tracked"] == 6
    assert whole.hooks.callbacks["hooks"].calls == 6
    assert whole.trainer.calls >= 12 * steps


def test_a_search_is_that_of_torch_evaluation_for_evaluation(maker):
    """The first evaluation is that of the loop, and every one drops out the same."""
    run = maker.run(**options(SEARCH, max_updates=1))
    model, evaluations = make_model(), []
    optimizer = SEARCH(model.parameters())
    batch = []

    class Watch(Counts):
        def to_device(self, moved):
            batch.append(moved)
            return super().to_device(moved)

    run.trainer.__class__ = Watch
    train(run)
    model[1].momentum = 0.1

    def closure():
        run.seeds.seed(0)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0][0]), batch[0][1])
        loss.backward()
        evaluations.append(loss.item())
        return loss

    run.counter.update = 0
    optimizer.step(closure)
    assert list(run.trainer.seen) == evaluations
    assert all(one.equal(other) for one, other in zip(run.trainer.model.parameters(), model.parameters(), strict=True))


def test_the_value_of_a_split_batch_is_that_of_the_whole_one(maker):
    seen = []

    class Remembers(SGD):
        def step(self, closure):
            seen.append(closure().item())

    for steps in (1, 3):
        model = nn.Sequential(nn.Linear(4, 3))
        nn.init.constant_(model[0].weight, 0.1), nn.init.zeros_(model[0].bias)
        more = {"model": model, "accumulation_steps": steps, "max_updates": 2}
        train(maker.run(run_id=f"steps{steps}", **options(partial(Remembers, lr=0.1), **more)))
    assert seen[:2] == pytest.approx(seen[2:])


def test_an_evaluation_that_is_not_finite_skips_the_update_as_a_whole(maker, bits):
    run = maker.run(**options(SEARCH, nan_loss="skip", max_updates=1))
    run.trainer.broken = (3,)
    before = run.trainer.model.tensors()
    before = bits({name: item.clone() for name, item in before.items()})
    with pytest.raises(LossError, match="every update was skipped"):
        train(run)
    assert bits(run.trainer.model.tensors()) == before
    assert run.trainer.state_dict()["optimizer"]["parameters"] == {} and run.trainer.loss_check.skips == 1


def test_an_evaluation_that_is_not_finite_ends_the_run(maker):
    run = maker.run(**options(SEARCH))
    run.trainer.broken = (3,)
    with pytest.raises(LossError, match="the loss of update 1 is nan"):
        train(run)


def test_what_cannot_evaluate_again_is_refused(maker):
    with pytest.raises(ConfigError, match="trainer.precision: float16 does not fit LBFGS"):
        maker.trainer(optimizer=SEARCH, precision="float16")
    both = {"search": OptimizerSpec(SEARCH, match=["0.*"]), "rest": OptimizerSpec(partial(SGD, lr=0.1))}
    with pytest.raises(ConfigError, match="optimizer.search: LBFGS evaluates the loss again, and needs turns"):
        maker.trainer(optimizer=both)


def test_a_line_search_leaves_the_weights_alone_where_its_learning_rate_is_0(maker, bits):
    run = maker.run(model=make_model(), optimizer=SEARCH, schedule=partial(cosine, end_value=0.0), max_updates=3)
    weights = []
    run.trainer.optimizers.only.optimizer.register_step_post_hook(
        lambda *_: weights.append(bits(run.trainer.model.tensors()))
    )
    train(run)
    assert len(weights) == 2 and run.counter.update == 3
