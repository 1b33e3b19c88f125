import pytest
import torch
from torch import nn

from ksuit_runner.errors import ConfigError
from ksuit_runner.models.base import ModelBase
from ksuit_runner.models.cnn import Cnn
from ksuit_runner.models.feature_extractor import FeatureExtractor
from ksuit_runner.models.mlp import Mlp


class Transformer(nn.Module):
    """Returns scores of the first token; its layers return tuples, and more dimensions than an image has."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.GRU(4, 4, batch_first=True) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x[:, 0])


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return Transformer().eval()


def extracted(module, inputs, **arguments):
    with torch.no_grad():
        return FeatureExtractor(module, path="callbacks.probe", **arguments)(module, lambda: module(inputs))


def test_every_pooling_of_tokens_as_computed_by_hand(transformer):
    inputs = torch.randn(5, 6, 4)
    with torch.no_grad():
        first = transformer.blocks[0](inputs)[0]
        tokens = transformer.blocks[1](first)[0]
        scores = transformer(inputs)
    wanted = {
        "none": tokens,
        "mean": tokens.mean(1),
        "max": tokens.max(1).values,
        "cls": tokens[:, 0],
        "flatten": tokens.reshape(5, 24),
    }
    for pooling, value in wanted.items():
        assert torch.equal(extracted(transformer, inputs, layers=["blocks.1"], pooling=pooling)["blocks.1"], value)
    by_channel = extracted(transformer, inputs, layers=["blocks.1"], channel_dim=1)
    assert torch.equal(by_channel["blocks.1"], tokens.mean(2))
    both = extracted(transformer, inputs, layers=["blocks.*"])
    assert list(both) == ["blocks.0", "blocks.1"] and torch.equal(both["blocks.0"], first.mean(1))
    assert torch.equal(extracted(transformer, inputs)["output"], scores)
    assert not any(module._forward_hooks for module in transformer.modules())


def test_of_images_the_channels_are_left():
    torch.manual_seed(0)
    module, images = Cnn((1, 8, 8), (10,)).eval(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        maps = module.stages[:2](images)
    found = extracted(module, images, layers=["stages.1"])["stages.1"]
    assert found.shape == (3, 64) and torch.allclose(found, maps.flatten(2).mean(2), atol=1e-6)


def test_a_compiled_model_has_the_same_features_and_is_not_compiled_again():
    module, inputs, compiled = Mlp((4,), (3,)).eval(), torch.randn(2, 4), []
    wanted = extracted(module, inputs, layers=["hidden.0"])["hidden.0"]
    model = ModelBase(module)
    extractor = FeatureExtractor(module, ["hidden.0"], path="p")

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    module.compile(backend=backend)
    with torch.no_grad():
        model(inputs)
        graphs = len(compiled)
        for _ in range(2):
            assert torch.equal(extractor(model, lambda: model(inputs))["hidden.0"], wanted)
    assert graphs == len(compiled) > 0


def test_what_the_next_layer_does_in_place_changes_no_features():
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), torch.randn(5, 4)
    with torch.no_grad():
        wanted = module[0](inputs)
    assert wanted.min() < 0
    assert torch.equal(extracted(module, inputs, layers=["0"])["0"], wanted)


def test_no_hook_is_left_by_a_failure(transformer):
    extractor = FeatureExtractor(transformer, ["blocks.*"], path="p")
    with pytest.raises(RuntimeError):
        extractor(transformer, lambda: transformer(torch.randn(2, 6, 5)))
    assert not any(module._forward_hooks for module in transformer.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["block.1"]}, r"p\.layers: 'block\.1' matches no layer\. Did you mean 'blocks\.1'"),
        ({"pooling": "meen"}, r"p\.pooling: there is no 'meen'\. Did you mean 'mean'"),
        ({"layers": ["unused"]}, r"p\.layers: 'unused' computes no tensor"),
        ({"layers": ["head"], "pooling": "cls"}, r"p\.pooling: the output of 'head', of shape \(2, 3\), is not \(samp"),
        ({"layers": ["head"], "channel_dim": 2}, r"of shape \(2, 3\), has no channels=2"),
    ],
)
def test_mistakes_are_named(transformer, arguments, message):
    with pytest.raises(ConfigError, match=message):
        FeatureExtractor(transformer, path="p", **arguments)(transformer, lambda: transformer(torch.randn(2, 6, 4)))
