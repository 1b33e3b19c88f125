"""Metrics of torchmetrics whose states go through those of a run: of every kind, on any number of ranks."""

from functools import partial

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, roc_auc_score
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAUROC,
    F1Score,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecisionRecallCurve,
    MultilabelF1Score,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.wrappers import MinMaxMetric
from worlds import in_threads

from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError
from ksuit_runner.trainer.batch_metric import BatchMetric, batch_metrics
from ksuit_runner.trainer.gathered import Gathered

CPU, BATCHES = torch.device("cpu"), 7


class Everything(Metric):
    """Has a state of every kind."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(2), "sum")
        self.add_state("count", torch.tensor(0), "sum")
        self.add_state("largest", torch.tensor(-torch.inf), "max")
        self.add_state("smallest", torch.tensor(torch.inf), "min")
        self.add_state("mean", torch.tensor(0.0), "mean")
        self.add_state("norm", torch.tensor(0.0), lambda of_ranks: of_ranks.square().sum(0).sqrt())
        self.add_state("rows", [], "cat")
        self.add_state("items", [], None)

    def update(self, preds, target):
        self.total += torch.stack([preds.sum(), target.sum()])
        self.count += len(preds)
        self.largest = torch.maximum(self.largest, preds.max())
        self.smallest = torch.minimum(self.smallest, preds.min())
        self.mean = preds.mean()
        self.norm = preds.norm()
        if len(preds) % 2:  # not at every batch
            self.rows.append(preds)
        self.items.extend([preds[:1], preds[1:], target.sum()])

    def compute(self):
        names = ("largest", "smallest", "mean", "norm")
        assert [len(item) for item in self.items[:3]] == [1, 2, 1]
        found = {name: getattr(self, name) for name in names}
        return {**found, "total": self.total, "count": self.count, "rows": torch.cat(self.rows).sum()}


def batch(number):
    generator = torch.Generator().manual_seed(number)
    size = 3 + number % 4
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def labels(number):
    generator = torch.Generator().manual_seed(number)
    scores = torch.randn(9, 4, generator=generator)
    return scores, torch.randint(4, (9,), generator=generator)


def values_on(world, make, batches, count=BATCHES):
    """Return the values over all batches, of which a rank has every so many."""
    metric, gathered = make(), Gathered(CPU, torch.float64)
    gathered.start(is_shared=world.size > 1)
    for number in range(world.rank, count, world.size):
        gathered.begin(number, counts=True)
        metric.add(gathered, ("ema", "any"), *batches(number))
    gathered.finish(world)
    return {end: value.item() for end, value in metric.values(gathered.totals, gathered.rows, ("ema", "any"))}


def everywhere(make, batches, count=BATCHES):
    """Return the values that one process finds, after a check that three ranks find the same."""
    alone = values_on(World(), make, batches, count)
    assert in_threads(3, lambda world: values_on(world, make, batches, count)) == [alone] * 3
    return alone


def test_states_of_every_kind_are_put_together_as_those_of_ranks():
    found = everywhere(lambda: BatchMetric(Everything(), "path", CPU), batch)
    preds, target = zip(*map(batch, range(BATCHES)), strict=True)
    every = torch.cat(preds)
    wanted = {
        "_total_0": every.double().sum(),
        "_total_1": torch.cat(target).double().sum(),
        "_count": len(every),
        "_largest": every.max(),
        "_smallest": every.min(),
        "_mean": torch.stack([item.mean() for item in preds]).mean(),
        "_norm": every.norm(),
        "_rows": torch.cat([item for item in preds if len(item) % 2]).sum(),
    }
    assert found == {end: pytest.approx(float(value), rel=1e-6) for end, value in wanted.items()}


def test_one_batch_for_three_ranks_and_a_number_of_classes_that_only_one_has_seen():
    make = partial(BatchMetric, partial(MulticlassF1Score, average="macro"), "path", CPU)
    scores, targets = labels(0)
    wanted = f1_score(targets, scores.argmax(1), average="macro")
    assert everywhere(make, labels, count=1) == {"": pytest.approx(wanted)}


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all:UserWarning")
@pytest.mark.parametrize(("metric", "reference"), [(PearsonCorrCoef, pearsonr), (SpearmanCorrCoef, spearmanr)])
def test_correlations_are_those_of_scipy(metric, reference):
    preds, target = (torch.cat(items) for items in zip(*map(batch, range(BATCHES)), strict=True))
    found = everywhere(lambda: BatchMetric(partial(metric), "path", CPU), batch)
    assert found == {"": pytest.approx(reference(preds, target).statistic, rel=1e-4)}


def test_scores_of_all_samples_are_those_of_scikit_learn():
    scores, targets = (torch.cat(items) for items in zip(*map(labels, range(BATCHES)), strict=True))
    wanted = roc_auc_score(targets, scores.softmax(1), multi_class="ovr")
    assert everywhere(lambda: BatchMetric(partial(MulticlassAUROC), "path", CPU), labels) == {"": pytest.approx(wanted)}
    # One score for each sample, and labels as a loss takes them: numbers.
    binary = lambda number: (labels(number)[0][:, :1], (labels(number)[1][:, None] > 1).float())  # noqa: E731
    wanted = roc_auc_score(targets > 1, scores[:, 0])
    make = partial(BatchMetric, partial(BinaryAUROC, average="macro"), "path", CPU)  # as the shipped file has it
    assert everywhere(make, binary) == {"": pytest.approx(wanted)}
    with pytest.raises(ConfigError, match=r"one value for each sample\. .* for two classes .* BinaryAccuracy$"):
        BatchMetric(partial(MulticlassAUROC), "path", CPU).add(Gathered(CPU, torch.float64), (), *binary(0))


class OfFour(MulticlassF1Score):
    def __init__(self, **kwargs):
        super().__init__(num_classes=4, **kwargs)


@pytest.mark.parametrize("metric", [OfFour, lambda **kwargs: OfFour(**kwargs), F1Score])
def test_an_average_that_is_passed_on_is_kept(metric):
    given = {"task": "multiclass", "num_classes": 4} if metric is F1Score else {}
    scores, targets = (torch.cat(items) for items in zip(*map(labels, range(BATCHES)), strict=True))
    wanted = f1_score(targets, scores.argmax(1), average="weighted")
    found = everywhere(lambda: BatchMetric(partial(metric, average="weighted", **given), "path", CPU), labels)
    assert found == {"": pytest.approx(wanted)}


def test_several_labels_short_floats_classes_last_and_mixed_targets():
    several = lambda number: (labels(number)[0].bfloat16(), (labels(number + 50)[0] > 0).float())  # noqa: E731
    scores, targets = (torch.cat(items) for items in zip(*map(several, range(BATCHES)), strict=True))
    make = partial(BatchMetric, partial(MultilabelF1Score, average="none"), "path", CPU)
    wanted = f1_score(targets, scores > 0, average=None)
    assert everywhere(make, several) == {f"_{index}": pytest.approx(value) for index, value in enumerate(wanted)}
    tokens = lambda number: (labels(number)[0].view(3, 3, 4), labels(number)[1].view(3, 3))  # noqa: E731
    make = partial(BatchMetric, partial(MulticlassF1Score), "path", CPU)
    mixed = lambda number: (labels(number)[0], torch.nn.functional.one_hot(labels(number)[1], 4) * 0.6 + 0.1)  # noqa: E731
    assert everywhere(make, tokens) == everywhere(make, mixed) == everywhere(make, labels)


def test_over_no_batch_there_are_no_values():
    assert everywhere(partial(BatchMetric, partial(MulticlassF1Score), "path", CPU), labels, count=0) == {}


def test_mistakes_are_found_when_it_is_made():
    for given, message in (
        (partial(MulticlassF1Score, averge="macro"), "path: ValueError: Unexpected keyword arguments: `averge`"),
        (partial(MulticlassF1Score, average="mean"), "path: ValueError: Expected argument `average`"),
        (MinMaxMetric(MulticlassF1Score(4)), "path: a metric of torchmetrics with states of its own .* MinMaxMetric"),
        (torch.nn.Linear(1, 1), "path: a metric of torchmetrics with states of its own is needed, not Linear"),
    ):
        with pytest.raises(ConfigError, match=message):
            BatchMetric(given, "path", CPU, classes=4)
    with pytest.raises(ConfigError, match=r"callbacks\.a\.metrics: at least one metric"):
        batch_metrics("callbacks.a", {}, CPU, (4,))
    with pytest.raises(ConfigError, match=r"path: MulticlassAUROC would hold 'preds' of every batch.*thresholds"):
        BatchMetric(partial(MulticlassAUROC), "path", CPU, classes=4, sums_only=True)
    BatchMetric(partial(MulticlassAUROC, thresholds=9), "path", CPU, classes=4, sums_only=True)


def test_mistakes_are_found_at_a_batch_and_at_the_end():
    metric = BatchMetric(partial(MulticlassF1Score), "path", CPU)
    with pytest.raises(ConfigError, match="path: MulticlassF1Score: "):
        metric.add(Gathered(CPU, torch.float64), (), torch.rand(5, 4), torch.randint(4, (6,)))
    for numbers in (torch.rand(5, 4), torch.rand(5)):  # neither probabilities of classes nor labels
        with pytest.raises(
            ConfigError, match=r"class indices .* targets float32 .*\. For a regression there is regression_errors"
        ):
            metric.add(Gathered(CPU, torch.float64), (), torch.rand(5, 4), numbers)
    with pytest.raises(ConfigError, match="path: MulticlassPrecisionRecallCurve computes a curve"):
        values_on(World(), partial(BatchMetric, partial(MulticlassPrecisionRecallCurve), "path", CPU), labels)


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("ksuit_runner.system.optional_package.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'torchmetrics' is not installed. pip install 'ksuit_runner\[metrics\]'"):
        batch_metrics("callbacks.a", {"f1": partial(MulticlassF1Score)}, CPU, (4,))
