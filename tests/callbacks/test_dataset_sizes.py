from callbacks.dataset_sizes import DatasetSizes


def test_every_dataset_is_counted_before_the_first_update(new_run):
    run = new_run({"sizes": DatasetSizes}, max_updates=2).train()
    assert run.metrics() == {"dataset_size/train", "dataset_size/test"}
    assert run.metric("dataset_size/train") == {0: 1438}
    assert run.metric("dataset_size/test") == {0: 359}
