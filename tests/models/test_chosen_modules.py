import pytest
import torch
from torch import nn

from ksuit_runner.errors import ConfigError
from ksuit_runner.models.chosen_modules import by_module, check_not_compiled, chosen_modules, tapped
from ksuit_runner.models.cnn import Cnn
from ksuit_runner.models.gpt import Gpt

PATH = "callbacks.norms"


@pytest.fixture(scope="module")
def gpt():
    return Gpt((8,), (8, 11), embed_dim=4, depth=2, num_heads=2)


def test_modules_at_a_depth_are_those_that_compute_there_and_the_leaves_above(gpt):
    names = ["token_embedding", "position_embedding", "dropout", "blocks.0", "blocks.1", "norm"]
    assert list(chosen_modules(gpt, None, 2, PATH)) == names
    assert list(chosen_modules(gpt, None, 1, PATH)) == [name for name in names if "." not in name]
    leaves = chosen_modules(gpt, None, None, PATH)
    assert "blocks.1.mlp.project" in leaves and not any(list(item.children()) for item in leaves.values())


def test_patterns_choose_modules_by_name(gpt):
    assert list(chosen_modules(gpt, ["blocks.{}.mlp", "norm"], 1, PATH)) == ["blocks.0.mlp", "blocks.1.mlp", "norm"]


def test_a_model_without_modules_is_watched_itself():
    model = nn.Linear(2, 2)
    assert chosen_modules(model, None, 2, PATH) == chosen_modules(model, ["*"], None, PATH) == {"": model}


@pytest.mark.parametrize(
    ("match", "depth", "message"),
    [
        (["block"], 2, r"callbacks.norms.match: 'block' matches no module. Did you mean 'blocks"),
        (["blocks"], 2, r"callbacks.norms.match: 'blocks' is a ModuleList, which is never called; write 'blocks.{}'"),
        ([], 2, r"callbacks.norms.match: at least one pattern is needed, or null to go by depth"),
        (None, 0, r"callbacks.norms.depth: a whole number of at least 1 is needed, not 0"),
    ],
)
def test_what_cannot_be_watched_is_an_error_that_says_why(gpt, match, depth, message):
    with pytest.raises(ConfigError, match=message):
        chosen_modules(gpt, match, depth, PATH)


def test_a_compiled_model_is_not_watched(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)  # the compiler takes seconds to import
    module = nn.Sequential(nn.Linear(2, 2))
    check_not_compiled(module, PATH)
    module[0].compile()
    with pytest.raises(ConfigError, match=r"callbacks.norms: .* set trainer.compile=false"):
        check_not_compiled(module, PATH)


def test_parameters_belong_to_the_module_that_the_first_parts_of_their_names_say(gpt):
    names = [name for name, _ in gpt.named_parameters()]
    groups = by_module([*names, "scale", "loss.temperature"], gpt, None, 2, PATH)
    modules = ["token_embedding", "position_embedding", "blocks.0", "blocks.1", "norm", "scale", "loss"]
    assert list(groups) == modules
    assert groups["blocks.1"] == [name for name in names if name.startswith("blocks.1.")]
    assert groups["scale"] == ["scale"] and groups["loss"] == ["loss.temperature"]
    assert by_module(names, gpt, None, None, PATH)["blocks.0.mlp.expand"] == [
        "blocks.0.mlp.expand.weight",
        "blocks.0.mlp.expand.bias",
    ]


def test_of_patterns_the_innermost_module_has_a_parameter_and_the_rest_is_left_out():
    model = Cnn((1, 8, 8), (10,), channels=(4, 4))
    groups = by_module([name for name, _ in model.named_parameters()], model, ["stages", "stages.1.{}"], None, PATH)
    assert groups == {
        "stages": ["stages.0.0.weight", "stages.0.1.weight", "stages.0.1.bias"],
        "stages.1.0": ["stages.1.0.weight"],
        "stages.1.1": ["stages.1.1.weight", "stages.1.1.bias"],
    }
    with pytest.raises(ConfigError, match=r"norms.match: 'stages.0.2' matches no module with parameters"):
        by_module([], model, ["stages.0.2"], None, PATH)


def test_taps_are_called_while_the_block_runs_and_leave_nothing_behind():
    model, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
    with tapped({"first": model[0], "last": model[1]}, lambda name, outputs: seen.append((name, outputs))):
        outputs = model(torch.ones(1, 2))
    assert [name for name, _ in seen] == ["first", "last"] and seen[1][1] is outputs
    model(torch.ones(1, 2))
    assert len(seen) == 2 and not any(item._forward_hooks for item in model.modules())
