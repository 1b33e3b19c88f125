"""Several optimizers: which has which parameters, at the same update or in turns, exactly over a resume."""

from functools import partial

import pytest
import torch
from by_hand import BATCH, WHOLE
from torch import nn, optim
from torch.optim import SGD, Adam, AdamW

from callbacks.gradient_norm import GradientNorm
from callbacks.learning_rate import LearningRate
from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.checkpoint.format import read_newest
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.config.factory import Factory
from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.engine.assembly import build_trainer
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import CheckpointError, ConfigError, KsuitError
from ksuit_runner.schedule import constant, linear
from ksuit_runner.system.signals import Interruption
from ksuit_runner.trainer.optimizer_specs import OptimizerSpec
from ksuit_runner.trainer.sgd import SgdTrainer

Muon = getattr(optim, "Muon", SGD)  # the oldest torch has none

BOTH = {
    "matrices": OptimizerSpec(partial(Muon, lr=0.1), min_ndim=2),
    "rest": OptimizerSpec(partial(AdamW, lr=0.01), schedule=partial(linear, end_factor=0.5)),
}


class Players(SgdTrainer):
    """The body and the head pull the outputs in opposite directions."""

    seen = ()

    def training_step(self, batch, model, turn=None):
        losses, outputs = super().training_step(batch, model)
        self.seen = (*self.seen, turn)
        return {"total": -losses["total"] if turn == "body" else losses["total"]}, outputs


PLAYERS = {
    "body": OptimizerSpec(partial(SGD, lr=0.1, momentum=0.9), match=["0.*", "1.*"], clip_norm=0.1),
    "head": OptimizerSpec(partial(Adam, lr=0.01), match=["3.*"]),
}
TURNS = {"trainer_class": Players, "optimizer": PLAYERS, "turns": ["head", "head", "body"]}


def weights(trainer):
    return {name: item.detach().clone() for name, item in trainer.model.module.named_parameters()}


def update(trainer, times=1):
    for _ in range(times):
        losses, _ = trainer.forward(BATCH)
        trainer.update.backward(losses, WHOLE)
        trainer.step()
        trainer.counter.update += 1


def test_two_optimizers_step_at_the_same_update_as_by_hand(maker, bits):
    trainer = maker.trainer(optimizer=BOTH, schedule=constant, dropout=0.0, clip_norm=0.5)
    model = maker.trainer(dropout=0.0).model.module
    matrices = [item for item in model.parameters() if item.ndim == 2]
    others = [item for item in model.parameters() if item.ndim == 1]
    first, second = Muon(matrices, lr=0.1), AdamW(others, lr=0.01, fused=True)
    for rate in (0.01, 0.01 * (1 - 0.5 / 7), 0.01 * (1 - 1 / 7)):
        second.param_groups[0]["lr"] = rate
        nn.functional.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 0.5)
        first.step(), second.step(), model.zero_grad()
    update(trainer, 3)
    torch.testing.assert_close(weights(trainer), dict(model.named_parameters()), rtol=1e-6, atol=1e-7)
    assert trainer.learning_rates()["matrices/default"] == 0.1


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_in_a_turn_only_the_parameters_of_that_optimizer_get_gradients_and_change(maker, precision):
    trainer = maker.trainer(**TURNS, dropout=0.0, precision=precision)
    for turn in ("head", "head", "body", "head"):
        before = weights(trainer)
        losses, _ = trainer.forward(BATCH)
        trainer.update.backward(losses, WHOLE)
        own = "3." if turn == "head" else ("0.", "1.")
        held = {name for name, item in trainer.model.module.named_parameters() if item.grad is not None}
        assert held == {name for name in before if name.startswith(own)}
        trainer.step()
        trainer.counter.update += 1
        changed = {name for name, values in weights(trainer).items() if not values.equal(before[name])}
        assert changed == held
    assert trainer.seen == ("head", "head", "body", "head")
    assert trainer.optimizers.members["body"].grad_norm > 0.1


class Evaluates(DatasetCallback):
    def _process_batch(self, batch, models):
        self.trainer.forward(batch, models[""])

    def _process_results(self, update_counter):
        pass


def test_turns_are_exact_over_a_resume(maker, bits):
    callbacks = {
        "rate": (LearningRate, {"every_n_updates": 1}),
        "norm": (GradientNorm, {"every_n_updates": 1}),
        "test": (Evaluates, {"dataset_key": "test", "every_n_updates": 4}),
    }
    rules = {"slow": {"match": ["3.bias"], "lr_factor": 0.5}}
    options = {**TURNS, "accumulation_steps": 2, "clip_norm": 1.0, "parameter_rules": rules, "max_updates": 11}
    whole = maker.run(callbacks, checkpoint={"every_n_updates": 1, "keep_last": 20}, **options)
    train(whole)
    train(maker.resumed(callbacks, update=4, **options))
    ends = [read_newest(maker.paths(name)) for name in ("run00000", "run00000-resumed")]
    assert bits(ends[0].model) == bits(ends[1].model)
    assert bits(ends[0].state["trainer"]) == bits(ends[1].state["trainer"])
    assert set(ends[0].state["trainer"]["optimizers"]) == {"body", "head"}
    logged = set(whole.log_writer.summary)
    assert {"learning_rate/body", "learning_rate/head/default", "learning_rate/head/slow"} <= logged
    assert {"gradient_norm", "gradient_norm/body"} <= logged and "learning_rate/head" not in logged
    assert whole.trainer.seen[:7] == ("head",) * 4 + ("body",) * 2 + ("head",)
    assert None in whole.trainer.seen  # in an evaluation it is nobody's turn


def test_rules_apply_to_the_optimizers_that_have_the_parameters(maker):
    rules = {"no_decay": {"max_ndim": 1, "betas": (0.5, 0.5)}, "head": {"match": ["3.*"], "lr_factor": 0.5}}
    trainer = maker.trainer(optimizer=BOTH, schedule=constant, parameter_rules=rules)
    assert trainer.learning_rates() == pytest.approx(
        {"matrices/default": 0.1, "matrices/head": 0.05, "rest/no_decay": 0.01, "rest/no_decay+head": 0.005}
    )
    without = maker.trainer(optimizer=BOTH, schedule=constant, parameter_rules={**rules, "head": None})
    assert without.learning_rates() == pytest.approx({"matrices/default": 0.1, "rest/no_decay": 0.01})
    with pytest.raises(ConfigError, match=f"parameter_rules.all.betas: {Muon.__name__} has no such option"):
        maker.trainer(optimizer=BOTH, parameter_rules={"all": {"match": ["*"], "betas": (0.5, 0.5)}})


def test_the_weight_decay_has_a_schedule(maker):
    specs = {**BOTH, "matrices": OptimizerSpec(partial(SGD, lr=0.1, weight_decay=0.5), min_ndim=2)}
    trainer = maker.trainer(optimizer=specs, weight_decay_schedule=partial(linear, end_value=1.0), max_updates=3)
    update(trainer)
    decays = [member.optimizer.param_groups[0]["weight_decay"] for member in trainer.optimizers.members.values()]
    assert decays == pytest.approx([0.75, 0.505])
    other = maker.trainer(optimizer=specs, weight_decay_schedule=partial(linear, end_value=1.0), max_updates=3)
    other.load_state_dict(trainer.state_dict())
    update(other)
    assert other.optimizers.members["matrices"].optimizer.param_groups[0]["weight_decay"] == 1.0
    none = {"matrices": OptimizerSpec(partial(SGD, lr=0.1), min_ndim=2), "rest": specs["rest"]}
    with pytest.raises(ConfigError, match=r"^weight_decay_schedule.end_value: a value of 0 cannot be changed"):
        maker.trainer(optimizer=none, weight_decay_schedule=partial(linear, end_value=1.0))


def spec(**selectors):
    return OptimizerSpec(partial(SGD, lr=0.1), **selectors)


@pytest.mark.parametrize(
    ("specs", "turns", "message"),
    [
        ({"a": spec(match=["0.*"]), "b": spec(match=["1.*"])}, None, "none of a, b matches the parameter '3.weight'"),
        ({"a": spec(match=["0.*"]), "b": spec(match=["*"])}, None, "'a' and 'b' both match the parameter '0.weight'"),
        ({"a": spec(), "b": spec()}, None, "optimizer.b: it needs match, .* optimizer.a takes what the others leave"),
        ({"a": spec(match=["haed.*"]), "b": spec()}, None, "optimizer.a: it matches no parameter"),
        ({"a": spec(match="0.*"), "b": spec()}, None, "optimizer.a.match: a list of patterns"),
        ({"a": spec(match=["0.*"], clip_norm=-1), "b": spec()}, None, "optimizer.a.clip_norm: a number above 0"),
        ({"a": spec(match=["0.*"]), "b": spec()}, ["a", "c"], "trainer.turns: there is no optimizer 'c'"),
        ({"a": spec(match=["0.*"]), "b": spec()}, ["a"], "trainer.turns: the optimizer 'b' never has its turn"),
        (partial(SGD, lr=0.1), ["a"], "trainer.turns: there is only one optimizer"),
    ],
)
def test_what_does_not_fit_together_is_named(maker, specs, turns, message):
    with pytest.raises(ConfigError, match=message):
        maker.trainer(optimizer=specs, turns=turns, trainer_class=Players)


def test_a_training_step_without_a_turn_and_a_loss_that_depends_on_nobody_are_errors(maker):
    with pytest.raises(ConfigError, match=r"trainer.turns: SgdTrainer.training_step has to take a turn"):
        maker.trainer(**TURNS | {"trainer_class": SgdTrainer})

    class Detached(Players):
        def training_step(self, batch, model, turn=None):
            return super().training_step(batch, model.module[:3])  # without the head

    trainer = maker.trainer(**TURNS | {"trainer_class": Detached})
    losses, _ = trainer.forward(BATCH)
    trainer.update.backward(losses, WHOLE)
    with pytest.raises(KsuitError, match="trainer.turns: the loss depends on no parameter of 'head'"):
        trainer.update.complete_gradients(UpdateWord())


def test_a_first_turn_whose_batch_has_nothing_of_the_loss_is_skipped(maker):
    class Nothing(Players):
        def training_step(self, batch, model, turn=None):
            losses, outputs = super().training_step(batch, model, turn)
            is_first = self.counter.update == 0
            return {"total": (losses["total"] * (float("nan") if is_first else 1), 0 if is_first else 2)}, outputs

    run = maker.run(**TURNS | {"trainer_class": Nothing}, accumulation_steps=3, nan_loss="skip")
    before = weights(run.trainer)
    train(run)
    assert run.counter.update == 8 and not all(map(torch.equal, before.values(), weights(run.trainer).values()))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_an_optimizer_may_be_frozen_for_a_while(maker, precision):
    """Its turn passes, or the others step alone."""
    for options, steps in ((TURNS, 3), ({"optimizer": PLAYERS}, 1)):
        frozen = {"head": {"match": ["3.*"], "until_update": steps}}
        trainer = maker.trainer(**options, freeze=frozen, precision=precision, clip_norm=1.0, dropout=0.0)
        for change in (False, True):
            before = weights(trainer)
            for _ in range(steps):
                trainer.freezing.follow(trainer.counter.update)
                losses, _ = trainer.forward(BATCH)
                trainer.update.backward(losses, WHOLE)
                assert trainer.update.complete_gradients(UpdateWord())
                trainer.step()
                trainer.counter.update += 1
            after = weights(trainer)
            assert after["3.weight"].equal(before["3.weight"]) != change
            assert not after["0.weight"].equal(before["0.weight"])


def test_a_state_of_other_optimizers_is_refused(maker):
    one, two = maker.trainer(), maker.trainer(optimizer=BOTH)
    with pytest.raises(CheckpointError, match="other optimizers: one, not matrices, rest"):
        two.load_state_dict(one.state_dict())
    with pytest.raises(KsuitError, match="several optimizers, trainer.optimizers.members: matrices, rest"):
        _ = two.optimizer


CONFIG = {
    "matrices": f"{{min_ndim: 2, _target_: torch.optim.{Muon.__name__}, lr: 0.1, clip_norm: 1.0}}",
    "rest": "{_target_: torch.optim.AdamW, schedule: {_target_: ksuit_runner.schedule.constant, warmup: 0}}",
}


def overrides(**changes):
    return [
        "~optimizer",
        *(f"+optimizer.{name}={text}" for name, text in {**CONFIG, **changes}.items()),
        "model=linear",
    ]


def test_a_config_names_several_optimizers(tmp_path):
    config = check_config(compose_config([*overrides(), f"output_dir={tmp_path}"]))
    trainer = build_trainer(Factory(config), 0, Interruption())
    members = trainer.optimizers.members
    assert [type(member.optimizer) for member in members.values()] == [Muon, AdamW]
    assert (members["matrices"].clip_norm, members["rest"].clip_norm) == (1.0, None)
    assert trainer.learning_rates()["rest/no_decay"] == 1e-3
    trainer.data_container.close()


def test_several_beside_the_default_one_are_told_how_to_replace_it(tmp_path, monkeypatch):
    message = r"optimizer.rest: the config has one optimizer already.*`- override /optimizer: null`"
    with pytest.raises(ConfigError, match=message):
        check_config(compose_config([f"+optimizer.rest={CONFIG['rest']}"]))
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "conf/experiment/mine.yaml"
    own.parent.mkdir(parents=True)
    text = "\n".join(f"  {name}: {item}" for name, item in CONFIG.items())
    own.write_text(f"# @package _global_\ndefaults:\n  - override /optimizer: null\noptimizer:\n{text}\n")
    assert list(check_config(compose_config(["experiment=mine"]))["optimizer"]) == ["matrices", "rest"]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("{_target_: torch.optim.AdamW, match: '*'}", "optimizer.rest.match: expects a list of texts"),
        (
            "{_target_: torch.optim.AdamW, mach: ['*']}",
            "optimizer.rest.mach: .* Did you mean 'match'",
        ),
        ("{lr: 0.1}", "optimizer.rest: it has no _target_"),
        ("{_target_: torch.nn.Linear}", "optimizer.rest._target_: .* does not derive from Optimizer"),
        (
            "{_target_: torch.optim.AdamW, schedule: {_target_: ksuit_runner.schedule.constant, warm: 1}}",
            "optimizer.rest.schedule.warm: there is no such argument",
        ),
    ],
)
def test_a_mistake_in_one_of_several_is_found_before_anything_is_built(rest, message):
    with pytest.raises(ConfigError, match=message):
        check_config(compose_config(overrides(rest=rest)))
