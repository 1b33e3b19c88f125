from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from ksuit_runner.data.python_docs import PythonDocs
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.gpt import Gpt


@pytest.fixture
def model() -> Gpt:
    torch.manual_seed(0)
    return Gpt((12,), (12, 20), embed_dim=16, depth=2, num_heads=4)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(20, (3, 12), generator=torch.Generator().manual_seed(0))


def test_shorter_contexts_work_and_give_the_same_logits(model: Gpt, tokens: torch.Tensor) -> None:
    assert model(tokens).shape == (3, 12, 20)
    assert model(tokens[:, :1]).shape == (3, 1, 20)
    torch.testing.assert_close(model(tokens[:, :7]), model(tokens)[:, :7])


def test_longer_contexts_are_an_error(model: Gpt) -> None:
    with pytest.raises(ConfigError, match="sequences of 13 tokens, but the context is 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("position", [1, 6, 11])
def test_a_token_changes_no_earlier_logits(model: Gpt, tokens: torch.Tensor, position: int) -> None:
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 20
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(dim=2).all()


def test_order_of_earlier_tokens_matters(model: Gpt, tokens: torch.Tensor) -> None:
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1])


def test_head_is_the_token_embedding(model: Gpt, tokens: torch.Tensor) -> None:
    assert [name for name, weight in model.named_parameters() if weight.shape == (20, 16)] == ["token_embedding.weight"]
    before = model(tokens)
    with torch.no_grad():
        absent = next(token for token in range(20) if token not in tokens[0])
        model.token_embedding.weight[absent] += 1
    after = model(tokens)
    changed = (before[0] != after[0]).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [absent]


def test_state_holds_no_tensor_twice(model: Gpt) -> None:
    pointers = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
    assert len(pointers) == len(set(pointers))


def test_initialization() -> None:
    torch.manual_seed(0)
    model = Gpt((64,), (64, 96), embed_dim=128, depth=8)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.005 if "project" in name else 0.02, rel=0.05), name


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    inputs, targets = PythonDocs("train").__getitems__(range(4))
    loss = F.cross_entropy(Gpt((64,), (64, 96))(inputs).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(torch.tensor(96.0).log().item(), abs=0.2)


def test_dropout_acts_in_training_only(tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = Gpt((12,), (12, 20), embed_dim=16, depth=1, dropout=0.5)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_gradient_steps_reduce_the_loss(train: Callable[..., list[float]]) -> None:
    torch.manual_seed(0)
    docs = PythonDocs("train", context_length=32)
    model = Gpt(docs.input_shape, docs.output_shape, embed_dim=32, depth=2)
    losses = train(model, [docs.__getitems__(range(16 * step, 16 * step + 16)) for step in range(60)], lr=0.01)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (1, 8, 8), "output_shape": (10,)}, "Gpt needs"),
        ({"output_shape": (11, 20)}, "Gpt needs"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"depth": 0}, "depth"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 3}, "num_heads: 3 heads do not divide embed_dim 128"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gpt(**{"input_shape": (12,), "output_shape": (12, 20), **arguments})
