from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from callbacks.flops import Flops
from ksuit_runner.errors import ConfigError
from ksuit_runner.models.cnn import Cnn
from ksuit_runner.models.linear import Linear
from ksuit_runner.tensors.flops import FlopCount

FLOPS = partial(Flops, every_n_updates=2)


def test_a_linear_model_has_those_of_its_products(new_run):
    run = new_run({"flops": partial(FLOPS, peak_tflops=1e-6)}, max_updates=4).train()
    # Outputs and gradients of the weights: inputs need no gradient.
    assert run.metric("flops_per_sample") == {2: 2 * 2 * 64 * 10, 4: 2 * 2 * 64 * 10}
    per_second = run.metric("flops_per_second")
    assert run.metric("utilization") == pytest.approx({update: value / 1e6 for update, value in per_second.items()})
    assert all(value > 0 for value in per_second.values())


def test_it_counts_what_torch_counts_and_changes_no_bit(new_run):
    def module():
        torch.manual_seed(0)
        return Cnn((1, 8, 8), (10,), [4, 8])

    counted = new_run({"flops": FLOPS}, "counted", module=module(), max_updates=4).train()
    alone = new_run({}, "alone", module=module(), max_updates=4).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in counted.weights.items())
    mode = FlopCounterMode(display=False)
    with mode:
        outputs = module()(torch.zeros(72, 1, 8, 8))
        nn.functional.cross_entropy(outputs, torch.zeros(72, dtype=torch.long)).backward()
    assert counted.metric("flops_per_sample")[4] * 72 == pytest.approx(mode.get_total_flops(), rel=1e-12)


def test_attention_is_computed_as_without_it():
    torch.manual_seed(0)
    layer, inputs = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), torch.randn(3, 5, 16)

    def gradients():
        layer.zero_grad()
        layer(inputs).square().sum().backward()
        return [parameter.grad for parameter in layer.parameters()]

    alone = gradients()
    with FlopCount() as count:
        watched = gradients()
    assert all(map(torch.equal, alone, watched))
    with FlopCounterMode(display=False) as mode:
        gradients()
    assert count.total == mode.get_total_flops() > 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there they are products of matrices")
def test_recurrent_layers_are_counted_where_they_are_one_kernel():
    torch.manual_seed(0)
    layer, inputs = nn.LSTM(16, 32, 2, batch_first=True), torch.randn(3, 5, 16, requires_grad=True)
    with FlopCount() as count:
        outputs, _ = layer(inputs)
    weights = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    assert count.total == 2 * 3 * 5 * weights
    with count:
        outputs.sum().backward()
    assert count.total == 3 * 2 * 3 * 5 * weights


def test_it_counts_once_for_the_whole_run(new_run):
    new_run({"flops": FLOPS}, stop_at=3, max_updates=4).train()
    resumed = new_run({"flops": FLOPS}, max_updates=4)
    resumed["flops"]._count = None
    assert resumed.train().metric("flops_per_sample") == {2: 2560, 4: 2560}


def test_an_update_that_is_skipped_is_not_counted(new_run):
    class First(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, outputs, targets):
            self.calls += 1
            return super().forward(outputs, targets) * (float("nan") if self.calls == 1 else 1.0)

    run = new_run({"flops": partial(Flops, every_n_updates=1)}, loss=First(), nan_loss="skip", max_updates=3).train()
    assert run.metric("flops_per_sample") == {2: 2560, 3: 2560}


def test_what_cannot_be_is_refused_at_once(new_run):
    with pytest.raises(ConfigError, match="peak_tflops: a number above 0 is needed, not 0"):
        new_run({"flops": partial(FLOPS, peak_tflops=0)})
    compiled = Linear((1, 8, 8), (10,))
    compiled._compiled_call_impl = compiled.forward  # as Module.compile leaves it
    with pytest.raises(ConfigError, match="flops_per_sample: it is needed with trainer.compile"):
        new_run({"flops": FLOPS}, module=compiled)
    assert new_run({"flops": partial(FLOPS, flops_per_sample=1.0)}, module=compiled)
