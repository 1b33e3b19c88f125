"""The callbacks that ship, together in a run that is composed as the command line does it."""

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from ksuit_runner.checkpoint.folders import read_tags
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.data.digits import Digits
from ksuit_runner.engine.runner import run
from ksuit_runner.models.linear import Linear
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.stored_run import Launch

OWN = {"accuracy/validation", "accuracy/validation/ema", "loss/validation", "loss/validation/ema"}
BEST = {"accuracy/test/best", "accuracy/test/best/ema", "loss/test/best", "loss/test/best/ema"}
DEFAULT = {
    *("loss/train", "learning_rate", "gradient_norm", "peak_memory_gb"),
    *("updates_per_second", "samples_per_second", "data_wait_fraction"),
}


@pytest.fixture
def trained(tmp_path, capsys):
    """Trains a linear model on the digits, 20 updates per epoch, and returns what is left of the run."""

    def train(*overrides):
        given = ["model=linear", "tracker=noop", "trainer.max_epochs=3", f"output_dir={tmp_path}", *overrides]
        outcome = run(check_config(compose_config(given)), Launch("", given))
        assert outcome.status == "FINISHED"
        paths = PathProvider(tmp_path, outcome.run_id)
        with closing(Journal(paths.journal)) as journal:
            metrics = {(point.key, point.step): point.value for points, _ in journal.read() for point in points}
        return SimpleNamespace(paths=paths, metrics=metrics, out=capsys.readouterr().out)

    return train


def weights(result, folder=None):
    folder = folder or result.paths.latest.read_text().strip()
    return (result.paths.checkpoints_dir / folder / "model.safetensors").read_bytes()


def test_the_default_run_logs_what_it_promises(trained):
    result = trained()
    assert {key for key, _ in result.metrics} == OWN | BEST | DEFAULT
    assert [step for key, step in result.metrics if key == "accuracy/validation/ema"] == [20, 40, 60]
    assert [step for key, step in result.metrics if key == "loss/train"] == [10, 20, 30, 40, 50, 60]
    assert "update 60/60" in result.out


def test_callbacks_change_nothing_about_training_and_their_order_nothing_about_metrics(trained):
    with_all = trained()
    reverse = trained("callbacks=[test_loss,best_checkpoint,loss,accuracy,ema,test_accuracy]")
    alone = trained("callbacks=[]", "default_callbacks=none")
    assert weights(with_all) == weights(reverse) == weights(alone)
    assert alone.metrics == {}
    evaluated = [
        {point: value for point, value in r.metrics.items() if point[0] in OWN | BEST} for r in (with_all, reverse)
    ]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 3 * len(OWN) + len(BEST)


def test_the_best_checkpoint_outlives_later_ones_and_holds_the_best_weights(trained, digits):
    # The loss falls. Where higher is called better, the best checkpoint is the first one.
    directions = ["metric_property_provider.higher=['*loss*']", "metric_property_provider.lower=[]"]
    result = trained("callbacks.best_checkpoint.metric_key=loss/validation", "checkpoint.keep_last=1", *directions)
    losses = {step: value for (key, step), value in result.metrics.items() if key == "loss/validation"}
    best = max(losses, key=losses.__getitem__)
    assert best == 20
    name = read_tags(result.paths)["best"]
    assert f"_U{best}_" in name
    folders = {path.name for path in result.paths.checkpoints_dir.iterdir() if path.is_dir()}
    assert folders == {name, "E3_U60_S3840"}
    model = Linear((1, 8, 8), (10,))
    model.load_state_dict(load_file(result.paths.checkpoints_dir / name / "model.safetensors"))
    with torch.no_grad():
        validation, test = Digits("validation", validation_fraction=0.1), digits["test"]
        found = [cross_entropy(model(data.inputs), data.targets).item() for data in (validation, test)]
    expected = [losses[best], result.metrics["loss/test/best", 60]]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_that_gets_no_better_stops_early(trained):
    # Nothing is learned: every value after the first one is no better.
    overrides = ["callbacks=[accuracy,early_stop]", "callbacks.early_stop.patience=2", "optimizer.lr=0"]
    result = trained(*overrides, "trainer.max_epochs=9")
    assert [step for key, step in result.metrics if key == "accuracy/validation"] == [20, 40, 60]
    assert "has not improved on" in result.out
