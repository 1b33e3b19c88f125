from functools import partial
from shutil import which

import pytest
import torch
from by_hand import BATCH, SGD, WHOLE, gradients, train, weights
from torch import nn

from ksuit_runner.data.digits import Digits
from ksuit_runner.data.fetch_batch import Part
from ksuit_runner.errors import ConfigError, KsuitError
from ksuit_runner.models.linear import Linear
from ksuit_runner.models.mlp import Mlp
from ksuit_runner.schedule import constant, linear
from ksuit_runner.testing import tiny_trainer
from ksuit_runner.trainer.backward import allow_several_passes
from ksuit_runner.trainer.batch import batch_size
from ksuit_runner.trainer.sgd import SgdTrainer

# The step


def test_clipping_limits_the_norm_of_all_gradients_together(maker):
    free = maker.trainer(optimizer=SGD, schedule=constant, dropout=0.0)
    before = weights(free)
    norm = torch.stack([gradient.norm() for gradient in gradients(free).values()]).norm()
    clipped = maker.trainer(optimizer=SGD, schedule=constant, dropout=0.0, clip_norm=norm.item() / 4)
    gradients(clipped)
    for trainer in (free, clipped):
        trainer.step()
    torch.testing.assert_close(clipped.grad_norm, norm)
    assert free.grad_norm is None
    for name in before:
        moved, full = weights(clipped)[name] - before[name], weights(free)[name] - before[name]
        torch.testing.assert_close(moved, full / 4, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_clipping_limits_each_value_and_then_the_norm(maker, precision):
    free = maker.trainer(optimizer=SGD, schedule=constant, dropout=0.0)
    expected = gradients(free)
    limit = max(gradient.abs().max().item() for gradient in expected.values()) / 2
    limits = {"clip_value": limit, "clip_norm": 100.0, "precision": precision}
    clipped = maker.trainer(optimizer=SGD, schedule=constant, dropout=0.0, **limits)
    before, expected = weights(free), {name: item.clamp(-limit, limit) for name, item in expected.items()}
    gradients(clipped)
    clipped.step()
    (rate,) = clipped.learning_rates().values()
    for name, gradient in expected.items():
        torch.testing.assert_close(before[name] - weights(clipped)[name], rate * gradient, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(
        clipped.grad_norm, torch.cat([item.flatten() for item in expected.values()]).norm(), rtol=0.1, atol=1e-3
    )


def test_the_learning_rate_follows_the_batch_size(maker):
    rules = {"head": {"match": ["3.*"], "lr": 0.2}}
    trainer = maker.trainer(reference_batch_size=4, parameter_rules=rules, schedule=constant, optimizer=SGD)
    (base,) = maker.trainer(schedule=constant, optimizer=SGD).learning_rates().values()
    assert trainer.learning_rates() == pytest.approx({"default": 1.5 * base, "head": 1.5 * 0.2})


def test_a_step_drops_the_gradients_and_advances_the_schedule(maker):
    trainer = maker.trainer(optimizer=SGD, schedule=linear, max_updates=5)
    gradients(trainer)
    trainer.step()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.learning_rates() == {"default": 0.75}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_low_precision_computes_in_it_and_keeps_weights_in_float32(maker, precision, clip_norm):
    trainer = maker.trainer(precision=precision, clip_norm=clip_norm, dropout=0.0)
    reference = gradients(maker.trainer(dropout=0.0))
    _, outputs = trainer.forward(BATCH)
    assert outputs.dtype == getattr(torch, precision)
    assert trainer.predict(BATCH[0]).dtype == outputs.dtype
    scale = trainer.scaler.get_scale()
    for name, gradient in gradients(trainer).items():
        torch.testing.assert_close(gradient / scale, reference[name], rtol=0.1, atol=0.01, msg=name)
    before = weights(trainer)
    trainer.step()
    after = weights(trainer)
    assert all(after[name].dtype == torch.float32 and not after[name].equal(before[name]) for name in after)


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.NAdam, lr=1.0)], ids=["fused", "not fused"])
def test_float16_skips_a_step_that_overflows_and_lowers_its_scale(maker, optimizer):
    trainer = maker.trainer(precision="float16", optimizer=optimizer)
    before, scale = weights(trainer), trainer.scaler.get_scale()
    losses, _ = trainer.forward(BATCH)
    trainer.update.backward({"total": losses["total"] * float("inf")}, WHOLE)
    trainer.step()
    assert all(tensor.equal(before[name]) for name, tensor in weights(trainer).items())
    assert trainer.scaler.get_scale() == scale / 2


def test_the_scale_is_part_of_the_state(maker):
    first, second = (maker.trainer(precision="float16") for _ in range(2))
    first.scaler.load_state_dict({**first.scaler.state_dict(), "scale": 128.0, "_growth_tracker": 7})
    second.load_state_dict(first.state_dict())
    assert second.scaler.state_dict() == first.scaler.state_dict()


@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="torch compiles with a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_model_keeps_the_keys_and_the_results_of_the_plain_one(maker):
    plain, compiled = (maker.trainer(compile=compile, dropout=0.0) for compile in (False, True))
    assert list(compiled.model.tensors()) == list(plain.model.tensors())
    assert [group["param_names"] for group in compiled.optimizer.param_groups] == [list(plain.model.tensors())]
    expected = gradients(plain)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.skipif(not (which("g++") or which("clang++")), reason="torch compiles with a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_graph_of_a_compiled_model_serves_several_backward_passes():
    model = Mlp((1, 8, 8), (10,))
    model.compile()
    with torch._functorch.config.patch(donated_buffer=True):
        allow_several_passes(model)
        for size in (9, 50, 48):  # the second size makes code for any size, whose buffers would be given away
            loss = model(torch.rand(size, 1, 8, 8)).square().mean()
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            loss.backward()


@pytest.mark.parametrize(
    ("given", "mode"), [(False, "none"), (True, None), ("default", "default"), ("max-autotune", "max-autotune")]
)
def test_the_mode_of_compilation(maker, monkeypatch, given, mode):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: modes.append(mode))
    maker.trainer(compile=given)
    assert modes == ([] if mode == "none" else [mode])


# What other tasks and callbacks use


class Autoencoder(SgdTrainer):
    def training_step(self, batch, model):
        outputs = model(batch["x"])
        reconstruction = (outputs - batch["x"]).square().mean()
        return {"total": reconstruction + outputs.abs().mean(), "reconstruction": reconstruction.detach()}, outputs


def test_another_task_overrides_the_training_step(maker):
    base = maker.trainer()
    trainer = Autoencoder(
        base.model, base.data_container, SGD, constant, nn.Identity(), max_updates=2, accumulation_steps=2
    )
    trainer.model.module = nn.Linear(4, 4)
    first, _ = trainer.start_update([Part({"x": torch.ones(2, 4)}, number, 2) for number in range(2)])
    losses, outputs = trainer.update.forward(first)
    trainer.update.backward(losses, first)
    assert set(losses) == {"total", "reconstruction"}
    assert outputs.shape == (2, 4)
    assert trainer.model.module.weight.grad is not None


def test_one_prediction_per_token(maker):
    trainer = maker.trainer()
    inputs, targets = torch.randn(2, 5, 4), torch.randint(3, (2, 5))
    losses, outputs = trainer.training_step((inputs, targets), nn.Linear(4, 3))
    assert losses["total"] == nn.functional.cross_entropy(outputs.reshape(10, 3), targets.reshape(10))


def test_after_evaluation_every_module_is_in_its_own_mode(maker):
    trainer = maker.trainer()
    trainer.model.module[1].eval()  # frozen by its user
    before = [module.training for module in trainer.model.modules()]
    with pytest.raises(ZeroDivisionError), trainer.evaluation():
        assert not any(module.training for module in trainer.model.modules())
        _ = 1 / 0
    assert [module.training for module in trainer.model.modules()] == before
    assert before.count(False) == 1


def test_weights_are_offered_for_evaluation_under_one_name_each(maker):
    trainer, other = maker.trainer(), nn.Linear(4, 3)
    trainer.add_evaluation_model("ema", other)
    assert trainer.evaluation_models == {"": trainer.model, "ema": other}
    with pytest.raises(KsuitError, match="weights named 'ema'"):
        trainer.add_evaluation_model("ema", other)


def test_the_size_of_a_batch_is_that_of_its_first_tensor():
    assert batch_size({"names": ["a"], "x": [torch.zeros(7, 2)]}) == 7
    with pytest.raises(KsuitError, match="no tensor"):
        batch_size({"names": ["a"]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "bfloat61"}, r"trainer.precision: there is no 'bfloat61'. Did you mean 'bfloat16'\?"),
        ({"accumulation_steps": 0}, "trainer.accumulation_steps: a whole number of at least 1"),
        ({"clip_norm": -1.0}, "trainer.clip_norm: .* -1.0"),
        ({"clip_norm": 0.0}, "trainer.clip_norm"),
        ({"device": "quantum"}, "trainer.device: 'quantum'"),
        ({"max_updates": None}, "one of max_epochs, max_updates, max_samples is needed"),
    ],
)
def test_invalid_arguments_are_refused(maker, wrong, message):
    with pytest.raises(ConfigError, match=message):
        maker.trainer(**wrong)


# State


def test_training_continues_from_its_state_bit_for_bit(maker, bits):
    rules = {"no_decay": {"match": ["*bias"], "weight_decay": 0.0}}
    whole, first, second = (maker.trainer(dropout=0.0, parameter_rules=rules) for _ in range(3))
    train(whole)
    train(first, updates=3)
    second.model.module.load_state_dict(weights(first))
    second.load_state_dict(first.state_dict())
    train(second)
    assert bits(second.state_dict()) == bits(whole.state_dict())
    assert bits(weights(second)) == bits(weights(whole))


def test_a_state_is_read_back_without_unpickling_objects(maker, tmp_path, bits):
    trainer = maker.trainer(precision="float16")
    train(trainer, updates=2)
    torch.save(trainer.state_dict(), tmp_path / "state")
    assert bits(torch.load(tmp_path / "state", weights_only=True)) == bits(trainer.state_dict())


def test_changed_settings_are_kept_and_advanced_to_the_stored_position(maker):
    first = maker.trainer(optimizer=SGD, schedule=linear, max_updates=8)
    train(first, updates=4)
    other = maker.trainer(optimizer=partial(SGD, lr=0.1), schedule=linear, max_updates=16)
    other.load_state_dict(first.state_dict(), same_settings=False)
    assert other.learning_rates()["default"] == pytest.approx(0.1 * (1 - 4 / 15))


def test_a_longer_run_has_the_rate_of_its_own_curve_before_its_first_update(maker):
    first = maker.trainer(optimizer=SGD, schedule=linear, max_updates=8)
    train(first)
    longer = maker.trainer(optimizer=SGD, schedule=linear, max_updates=17)
    longer.load_state_dict(first.state_dict())
    longer.optimizers.follow_new_length()
    assert longer.learning_rates() == {"default": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses, outputs: losses["total"], "returns a Tensor; it has to return"),
        (lambda losses, outputs: ({"classes": losses["total"]}, outputs), "no 'total', .* sum up its losses for it"),
        (lambda losses, outputs: ((losses["total"], "5"), outputs), "returns a str as the count of 'total'"),
        (lambda losses, outputs: ((losses["total"], -5), outputs), "returns -5.0 as the count of 'total'"),
        (
            lambda losses, outputs: ((losses["total"], torch.tensor(-5)), outputs),
            "returns -5.0 as the count of 'total'",
        ),
        (lambda losses, outputs: ({**losses, "accuracy": 0.5}, outputs), "returns a float as 'accuracy'"),
        (lambda losses, outputs: ({"total": outputs}, outputs), r"tensor of shape \(5, 3\) as 'total'"),
        (lambda losses, outputs: ({"total": losses["total"].detach()}, outputs), "without a gradient"),
    ],
)
def test_what_a_training_step_returns_is_explained(maker, change, message):
    class Own(SgdTrainer):
        def training_step(self, batch, model):
            return change(*super().training_step(batch, model))

    base = maker.trainer()
    trainer = Own(base.model, base.data_container, SGD, constant, nn.CrossEntropyLoss(), max_updates=2)
    with pytest.raises(KsuitError, match=message):
        trainer.forward(BATCH)


class OwnBackward(SgdTrainer):
    def training_step(self, batch, model):
        loss, outputs = super().training_step(batch, model)
        loss["total"].backward()
        return loss, outputs


def test_gradients_in_an_evaluation_are_explained():
    trainer = tiny_trainer({"train": Digits("train")}, Linear((1, 8, 8), (10,)), trainer_class=OwnBackward)
    batch = Digits("train").__getitems__(range(4))
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad") as raised:
        trainer.forward(batch, trainer.model)
    assert "computes without gradients" in "".join(raised.value.__notes__)
