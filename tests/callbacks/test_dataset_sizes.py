from callbacks.dataset_sizes import DatasetSizes
from ksuit_runner.tracker.noop import NoopTracker


def test_the_size_of_every_dataset_is_a_parameter_of_the_run(new_run, monkeypatch):
    recorded = {}
    monkeypatch.setattr(NoopTracker, "log_params", lambda self, params: recorded.update(params))
    run = new_run({"sizes": DatasetSizes}, max_updates=2).train()
    assert recorded == {"dataset_size/train": 1438, "dataset_size/test": 359}
    assert not run.metrics(), "a metric would be a chart of one point"
