from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW

from ksuit_runner.errors import CheckpointError, ConfigError
from ksuit_runner.trainer.build_optimizer import build_optimizer
from ksuit_runner.trainer.optimizer_needs import needs_closure
from ksuit_runner.trainer.optimizer_state import load_optimizer_state, optimizer_state

CPU = torch.device("cpu")
ADAMW = partial(AdamW, lr=0.1, weight_decay=0.5)
NO_DECAY = {"no_decay": {"match": ["*bias", "*norm*"], "weight_decay": 0.0}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def net():
    torch.manual_seed(0)
    return Net()


def step(model, optimizer, updates=1):
    for update in range(updates):
        inputs = torch.randn(4, 2, generator=torch.Generator().manual_seed(update))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def options(optimizer, key):
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


def test_rules_set_options_by_name():
    optimizer = build_optimizer(ADAMW, net(), NO_DECAY, CPU)
    assert options(optimizer, "weight_decay") == {
        "body.weight": 0.5,
        "body.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.weight": 0.5,
        "head.bias": 0.0,
    }
    assert {group["name"] for group in optimizer.param_groups} == {"default", "no_decay"}


def test_rules_combine_and_the_last_one_wins():
    rules = {
        **NO_DECAY,
        "head": {"match": ["head.*"], "lr_factor": 0.1},
        "all": {"match": ["*.weight"], "weight_decay": 0.25},
    }
    optimizer = build_optimizer(ADAMW, net(), rules, CPU)
    rates, decays = options(optimizer, "lr"), options(optimizer, "weight_decay")
    assert rates["head.weight"] == rates["head.bias"] == pytest.approx(0.01)
    assert rates["body.weight"] == rates["norm.bias"] == 0.1
    assert decays["norm.weight"] == decays["head.weight"] == 0.25
    assert decays["head.bias"] == 0.0
    assert all("lr_factor" not in group for group in optimizer.param_groups)


def test_a_factor_applies_to_the_rules_own_rate():
    rules = {"head": {"match": ["head.*"], "lr": 1.0, "lr_factor": 0.5}}
    assert options(build_optimizer(ADAMW, net(), rules, CPU), "lr")["head.bias"] == 0.5


def test_frozen_parameters_wait_in_their_group_and_cost_nothing():
    """So the groups of a run are the same before and after something thaws, and a resume finds them."""
    model, all_open = net(), build_optimizer(ADAMW, net(), NO_DECAY, CPU)
    model.body.requires_grad_(False)
    optimizer = build_optimizer(ADAMW, model, NO_DECAY, CPU)
    assert options(optimizer, "weight_decay") == options(all_open, "weight_decay")
    step(model, optimizer)
    assert set(optimizer_state(optimizer)["parameters"]) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    model.body.requires_grad_(True)
    before = model.body.weight.clone()
    step(model, optimizer)
    assert not model.body.weight.equal(before)


def test_integers_are_skipped_and_a_frozen_model_is_refused():
    model = net()
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    assert "codes" not in options(build_optimizer(ADAMW, model, {}, CPU), "lr")
    with pytest.raises(ConfigError, match="no parameter to train"):
        build_optimizer(ADAMW, model.requires_grad_(False), {}, CPU)


def test_a_rule_may_select_by_the_number_of_dimensions():
    """Norms have other names in every model, and always one dimension."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    rules = {"flat": {"max_ndim": 1, "weight_decay": 0.0}, "first": {"match": ["0.*"], "max_ndim": 1, "lr": 0.7}}
    optimizer = build_optimizer(ADAMW, model, rules, CPU)
    decays, rates = options(optimizer, "weight_decay"), options(optimizer, "lr")
    assert {name for name, decay in decays.items() if decay} == {"0.weight", "2.weight"}
    assert {name for name, rate in rates.items() if rate == 0.7} == {"0.bias"}


class Deep(nn.Module):
    """Twelve blocks, so that layers are ordered as numbers and not as text."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.blocks = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
        self.head = nn.Linear(2, 1)


def test_the_rate_decays_layer_by_layer_towards_the_input():
    rules = {
        **NO_DECAY,
        "layers": {"layers": ["embed.*", "blocks.{}.*"], "decay": 0.75},
        "slow": {"match": ["blocks.11.*", "head.*"], "lr_factor": 0.1},
    }
    optimizer = build_optimizer(ADAMW, Deep(), rules | {"no_decay": {"max_ndim": 1, "weight_decay": 0.0}}, CPU)
    rates, decays = options(optimizer, "lr"), options(optimizer, "weight_decay")
    assert rates["head.weight"] == pytest.approx(0.01)
    assert rates["blocks.11.bias"] == pytest.approx(0.1 * 0.75 * 0.1)
    for block in range(11):
        assert rates[f"blocks.{block}.weight"] == pytest.approx(0.1 * 0.75 ** (12 - block))
    assert rates["embed.weight"] == pytest.approx(0.1 * 0.75**13)
    assert (decays["blocks.2.bias"], decays["blocks.2.weight"]) == (0.0, 0.5)
    names = {group["name"] for group in optimizer.param_groups}
    assert {"layers.0", "no_decay+layers.0", "layers.12+slow", "slow"} <= names


def test_layers_are_selected_among_those_that_match():
    rules = {"layers": {"match": ["*.weight"], "layers": "blocks.{}.*", "decay": 0.5}}
    rates = options(build_optimizer(ADAMW, Deep(), rules, CPU), "lr")
    assert (rates["blocks.10.weight"], rates["blocks.10.bias"]) == (0.025, 0.1)


def test_an_optional_rule_may_match_nothing():
    build_optimizer(ADAMW, net(), {"mine": {"match": ["tail.*"], "optional": True, "lr": 1.0}}, CPU)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"matches": ["*"], "weight_decay": 0.0}, r"parameter_rules.mine.match: a list .*Did you mean 'matches'"),
        ({"match": "*bias"}, r"parameter_rules.mine.match: a list"),
        ({"match": ["*"], "weight_decya": 0.0}, r"parameter_rules.mine.weight_decya: .*Did you mean 'weight_decay'"),
        ({"match": ["haed.*"], "lr": 1.0}, r"parameter_rules.mine: it matches no parameter. Did you mean 'head'\?"),
        ({"match": ["body.wieght"], "lr": 1.0}, r"parameter_rules.mine: .* Did you mean 'body.weight'\?"),
        (
            {"layers": "bodi.{}.*", "decay": 0.5},
            r"parameter_rules.mine: it matches no parameter. Did you mean 'body'\?",
        ),
        ({"layers": "body.*", "decay": 1.5}, r"parameter_rules.mine.decay: a factor above 0 and at most 1 .*, not 1.5"),
        ({"layers": "body.*"}, r"parameter_rules.mine.decay: a factor above 0"),
        ({"match": ["body.*"], "decay": 0.5}, r"parameter_rules.mine.layers: patterns of the layers are needed"),
        ({"match": ["body.*"], "max_ndim": 0, "lr": 1.0}, r"parameter_rules.mine: it matches no parameter"),
        ({"max_ndim": "one"}, r"parameter_rules.mine.max_ndim: a number of dimensions is needed, not 'one'"),
        ({"match": ["*"], "lr_factor": "x"}, r"parameter_rules.mine.lr_factor: a factor of at least 0 .*, not 'x'"),
        (
            {"match": ["*"], "lr_factor": -1},
            r"parameter_rules.mine.lr_factor: a factor of at least 0 .*, not -1",
        ),
        (
            {"layers": ["body.*", "haed.{}.*"], "decay": 0.5},
            r"parameter_rules.mine: 'haed.{}.\*' matches no parameter. Did you mean 'head'\?",
        ),
    ],
)
def test_an_invalid_rule_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(ADAMW, net(), {"mine": spec}, CPU)


@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_kernels_are_fused_where_there_are_some(cls):
    optimizer = build_optimizer(partial(cls, lr=0.1), net(), NO_DECAY, CPU)
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]


def test_kernels_that_were_chosen_are_kept():
    optimizer = build_optimizer(partial(AdamW, foreach=True), net(), {}, CPU)
    assert optimizer.param_groups[0]["foreach"] and not optimizer.param_groups[0]["fused"]


def test_an_optimizer_without_fused_kernels_works():
    model = net()
    optimizer = build_optimizer(partial(Adafactor, lr=0.1), model, NO_DECAY, CPU)
    step(model, optimizer)
    assert "fused" not in optimizer.param_groups[0]


def test_parameters_without_fused_kernels_fall_back():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = build_optimizer(ADAMW, model, {}, CPU)
    assert not optimizer.param_groups[0]["fused"]
    model.weight.abs().sum().backward()
    optimizer.step()
    assert (model.weight.detach().abs() < 1).all()


def test_the_state_survives_other_groups_in_another_order(bits):
    """A state that is loaded under other rules has to continue exactly as the first optimizer does, by parameter."""
    models, rules = [net(), net()], [{}, {"first": {"match": ["head.*"]}, "second": {"match": ["body.bias"]}}]
    first, second = (build_optimizer(ADAMW, model, rule, CPU) for model, rule in zip(models, rules, strict=True))
    step(models[0], first, 3)
    models[1].load_state_dict(models[0].state_dict())
    state = optimizer_state(first)
    load_optimizer_state(second, copied(state))
    assert bits(optimizer_state(second)["parameters"]) == bits(state["parameters"])
    step(models[0], first, 2)
    step(models[1], second, 2)
    assert bits(models[1].state_dict()) == bits(models[0].state_dict())


def copied(state):
    """Copy a state as a checkpoint does, so that the two optimizers share no tensor."""
    parameters = {
        name: {key: value.clone() for key, value in values.items()} for name, values in state["parameters"].items()
    }
    return {"parameters": parameters, "groups": {name: dict(group) for name, group in state["groups"].items()}}


def test_options_are_loaded_by_group_name_unless_they_have_changed():
    first, second, third = (build_optimizer(partial(AdamW, lr=rate), net(), NO_DECAY, CPU) for rate in (0.1, 0.2, 0.3))
    load_optimizer_state(second, optimizer_state(first))
    load_optimizer_state(third, optimizer_state(first), with_options=False)
    assert {*options(second, "lr").values()} == {0.1}
    assert {*options(third, "lr").values()} == {0.3}


def test_kernels_may_change_between_checkpoint_and_resume():
    first, second = (
        build_optimizer(ADAMW, net(), {}, CPU),
        build_optimizer(partial(ADAMW, foreach=True), net(), {}, CPU),
    )
    load_optimizer_state(second, optimizer_state(first))
    assert second.param_groups[0]["foreach"] and not second.param_groups[0]["fused"]


def test_a_state_of_another_model_is_refused():
    model = net()
    optimizer = build_optimizer(ADAMW, model, {}, CPU)
    step(model, optimizer)
    state = optimizer_state(optimizer)
    state["parameters"]["heat.weight"] = state["parameters"].pop("head.weight")
    with pytest.raises(
        CheckpointError, match=r"'heat.weight', which the model does not have. Did you mean 'head.weight'"
    ):
        load_optimizer_state(optimizer, state)


# Optimizers with a will of their own


class Counting(SGD):
    """Halves its rate at every step: counts in an attribute, in its groups and in an entry that is no parameter's."""

    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, lr, momentum)
        self.steps = 0
        for group in self.param_groups:
            group["k"] = 0
        self.defaults["k"] = 0

    def step(self, closure=None):
        self.steps += 1
        self.state["all"]["steps"] = torch.tensor(self.steps)
        for group in self.param_groups:
            group["k"] += 1
            group["lr"] = 0.1 / (group["k"] + self.steps + self.state["all"]["steps"].item())
        super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


class Wrapping(SGD):
    """Lays its state out as it likes."""

    def state_dict(self):
        return {"inner": super().state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["inner"])


@pytest.mark.parametrize("cls", [Counting, partial(Wrapping, momentum=0.9)])
def test_additional_state_of_an_optimizer_is_stored_and_restored(bits, cls):
    models = [net(), net()]
    first, second = (build_optimizer(partial(cls, lr=0.1), model, NO_RATE, CPU) for model in models)
    step(models[0], first, 3)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_state(second, deepcopy(optimizer_state(first)))
    step(models[0], first, 2)
    step(models[1], second, 2)
    assert bits(models[1].state_dict()) == bits(models[0].state_dict())
    assert bits(optimizer_state(second)) == bits(optimizer_state(first))


NO_RATE = {"no_rate": {"match": ["*bias"], "momentum": 0.5}}


def test_a_fork_has_its_own_options_and_the_stored_counts():
    first, second = (build_optimizer(partial(Counting, lr=rate), net(), {}, CPU) for rate in (0.1, 0.2))
    first.steps = first.param_groups[0]["k"] = 7
    load_optimizer_state(second, optimizer_state(first), with_options=False)
    assert (second.steps, second.param_groups[0]["k"], second.param_groups[0]["lr"]) == (7, 7, 0.2)


@pytest.mark.parametrize("cls", [Counting, Wrapping])
def test_what_is_counted_by_group_needs_the_same_groups(cls):
    first = build_optimizer(partial(cls, lr=0.1), net(), {}, CPU)
    second = build_optimizer(partial(cls, lr=0.1), net(), NO_RATE, CPU)
    with pytest.raises(CheckpointError, match="keep trainer.parameter_rules as they were"):
        load_optimizer_state(second, optimizer_state(first), with_options=False)


class Sharp(SGD):
    """Asks for its closure when it steps."""

    def step(self, closure=None):
        assert closure is not None, "a closure is required"


class Calls(SGD):
    def step(self, closure=None):
        return closure()


@pytest.mark.parametrize(("cls", "needs"), [(LBFGS, True), (Sharp, True), (Calls, True), (AdamW, False), (SGD, False)])
def test_whether_a_step_needs_a_closure_is_known_before_the_first(cls, needs):
    assert needs_closure(cls, build_optimizer(cls, net(), {}, CPU)) == needs


class Graph(SGD):
    def step(self, graph):
        pass


def test_a_step_that_needs_more_than_gradients_or_a_single_group_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer: Graph does not fit: its step\(\) needs graph"):
        build_optimizer(Graph, net(), {}, CPU)
    with pytest.raises(ConfigError, match="optimizer: LBFGS .*parameter groups.*; trainer.parameter_rules=null makes"):
        build_optimizer(LBFGS, net(), {"head": {"match": ["head.*"]}}, CPU)


class Particular(SGD):
    """Takes three dimensions only."""

    def step(self, closure=None):
        if any(parameter.ndim != 3 for group in self.param_groups for parameter in group["params"]):
            raise ValueError("three dimensions are needed")
        super().step()


def test_an_optimizer_is_not_refused_for_what_only_concerns_the_rehearsal():
    model = nn.Conv1d(2, 2, 2, bias=False)
    optimizer = build_optimizer(partial(Particular, lr=0.1), model, {}, CPU)
    assert not needs_closure(partial(Particular, lr=0.1), optimizer)
    model(torch.ones(1, 2, 3)).sum().backward()
    optimizer.step()


def test_sparse_gradients_go_to_an_optimizer_that_takes_them():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True))
    with pytest.raises(ConfigError, match="AdamW takes no sparse gradients, as '0' has them; SGD"):
        build_optimizer(ADAMW, model, {}, CPU)
    optimizer = build_optimizer(partial(SGD, lr=0.1), model, {}, CPU)
    model(torch.tensor([1, 1])).sum().backward()
    optimizer.step()


def test_momentum_begins_with_zero_after_a_first_step_whose_gradient_overflows(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda item, **kwargs: torch.full_like(item, float("nan"), **kwargs))
    model, scaler = nn.Linear(2, 1), torch.amp.GradScaler("cpu")
    optimizer = build_optimizer(partial(SGD, lr=0.1, momentum=0.9), model, {}, CPU)
    assert optimizer.param_groups[0]["fused"]
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[model.bias]["momentum_buffer"] == 1.0 and model.weight.isfinite().all()
