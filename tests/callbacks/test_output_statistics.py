from functools import partial

import pytest
import torch

from callbacks.output_statistics import OutputStatistics
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.sgd import SgdTrainer

SEEN: list[torch.Tensor] = []


class Named(SgdTrainer):
    """Names its outputs, and keeps them."""

    def training_step(self, batch, model):
        losses, outputs = super().training_step(batch, model)
        SEEN.append(outputs.detach())
        return losses, {"scores": outputs, "hidden": [outputs.square(), (outputs > 0)], "text": "no tensor"}


@pytest.mark.parametrize("parts", [1, 3])
def test_the_statistics_are_those_of_all_outputs_since_the_last_log(new_run, parts):
    SEEN.clear()
    callback = partial(OutputStatistics, match=["scores", "hidden/*"], every_n_updates=2)
    options = {"trainer_class": Named, "max_updates": 5, "accumulation_steps": parts}
    run = new_run({"outputs": callback}, **options).train()
    scores = torch.cat(SEEN[2 * parts : 4 * parts]).double()
    squares, positive = scores.float().square().double(), (scores > 0).double()
    for name, values in {"scores": scores, "hidden/0": squares, "hidden/1": positive}.items():
        wanted = {"mean": values.mean(), "std": values.std(correction=0), "abs_max": values.abs().max()}
        for kind, value in wanted.items():
            assert run.metric(f"outputs/{name}/{kind}")[4] == pytest.approx(value.item(), rel=1e-6)
    assert len(run.metrics()) == 9 and list(run.metric("outputs/scores/mean")) == [2, 4]


def test_a_resumed_run_logs_the_same_statistics(new_run):
    callbacks = {"outputs": partial(OutputStatistics, every_n_updates=4)}
    whole = new_run(callbacks, run_id="whole", max_updates=8).train()
    new_run(callbacks, run_id="cut", stop_at=3, max_updates=8).train()
    resumed = new_run(callbacks, run_id="cut", max_updates=8).train()
    assert whole.metrics() == {f"outputs/output/{kind}" for kind in ("mean", "std", "abs_max")}
    assert all(resumed.metric(key) == whole.metric(key) for key in whole.metrics())
    alone = new_run({}, run_id="alone", max_updates=8).train()
    assert all(torch.equal(alone.weights[name], weight) for name, weight in whole.weights.items())


def test_a_pattern_without_a_match_is_an_error_that_lists_the_names(new_run):
    callback = partial(OutputStatistics, match=["score"], every_n_updates=2)
    run = new_run({"outputs": callback}, trainer_class=Named, max_updates=2)
    with pytest.raises(ConfigError, match=r"(?s)outputs\.match: 'score' matches no output. Did you mean 'scores'"):
        run.train()


def test_a_running_mean_alone_per_interval_and_per_epoch(new_run):
    SEEN.clear()
    options = {"match": ["scores"], "statistics": ["mean"], "per_epoch": True, "every_n_updates": 8}
    run = new_run({"outputs": partial(OutputStatistics, **options)}, trainer_class=Named, max_epochs=1).train()
    assert run.metrics() == {"outputs/scores/mean", "outputs/scores/mean/epoch"}
    wanted = torch.cat(SEEN).double().mean().item()
    assert run.metric("outputs/scores/mean/epoch") == {20: pytest.approx(wanted, rel=1e-6)}
    with pytest.raises(ConfigError, match="statistics: there is no 'meen'. Did you mean 'mean'"):
        new_run({"outputs": partial(OutputStatistics, statistics=["meen"], every_n_updates=8)})
