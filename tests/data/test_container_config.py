import pytest
import torch

from ksuit_runner.counter import Interval
from ksuit_runner.data.batch_plan import Evaluation
from ksuit_runner.data.container import DataContainer
from ksuit_runner.data.tensor_dataset import TensorDataset
from ksuit_runner.errors import ConfigError


def make_container(**kwargs):
    datasets = {"train": range(10), "test": range(5)}
    return DataContainer(**{"datasets": datasets, "batch_size": 3, "seed": 0} | kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train": "trian"}, "data.train: there is no dataset 'trian'. Did you mean 'train'?"),
        ({"batch_size": 0}, "data.batch_size: a whole number of at least 1 is needed, not 0"),
        ({"batch_size": True}, "data.batch_size: a whole number of at least 1 is needed, not True"),
        ({"eval_batch_size": 2.5}, "data.eval_batch_size: a whole number of at least 1 is needed, not 2.5"),
        ({"num_workers": -1}, "data.num_workers: a whole number of at least 0 is needed, not -1"),
        ({"prefetch": 0}, "data.prefetch: a whole number of at least 1 is needed, not 0"),
        ({"datasets": {}}, "data.train: there is no dataset 'train'. There are none."),
        ({"datasets": {"train": []}}, "data.datasets.train: list is empty"),
        (
            {"datasets": {"train": [1], "test": 5}},
            "data.datasets.test: int is not a dataset: it needs __len__ and __getitem__, or for a stream __iter__ or "
            "iterate",
        ),
    ],
)
def test_mistakes_name_their_config_path(kwargs, message):
    with pytest.raises(ConfigError) as error:
        make_container(**kwargs)
    assert str(error.value) == message


def test_unknown_datasets_are_found_before_anything_is_fetched():
    container = make_container()
    with pytest.raises(ConfigError, match=r"data.datasets: there is no dataset 'tset'. Did you mean 'test'\?"):
        container.evaluation_batches("tset")
    with pytest.raises(ConfigError, match="there is no dataset 'tset'"):
        container.open(container.new_counter(max_updates=1), [Evaluation(Interval(every_n_updates=1), "tset")])


def test_shapes_are_what_the_training_dataset_says():
    dataset = TensorDataset(torch.zeros(4, 3, 2), torch.zeros(4), output_shape=[7])
    container = make_container(datasets={"train": dataset})
    assert container.train_dataset is dataset
    assert container.input_shape == (3, 2)
    assert container.output_shape == (7,)


def test_shapes_that_the_dataset_does_not_have():
    container = make_container(datasets={"train": [(torch.zeros(3, 2), 1)] * 4})
    assert container.input_shape == (3, 2)
    with pytest.raises(ConfigError, match=r"data.datasets.train: list has no attribute 'output_shape'"):
        _ = container.output_shape
    with pytest.raises(ConfigError, match=r"data.datasets.train: list has no attribute 'input_shape'"):
        _ = make_container(datasets={"train": ["text"] * 4}).input_shape


def test_counter_follows_the_data():
    counter = make_container(drop_last=False).new_counter(max_epochs=2)
    assert (counter.updates_per_epoch, counter.samples_per_epoch, counter.end_update) == (4, 10, 8)
    with pytest.raises(ConfigError, match=r"data.batch_size: 11 is more than the 10 training samples"):
        make_container(batch_size=11).new_counter(max_epochs=1)


def test_description_of_the_datasets():
    description = make_container().describe()
    assert list(description) == ["train", "test"]
    assert description["test"]["size"] == 5
    assert description["test"]["class"] == "builtins.range"
    assert description["test"]["digest"] == make_container(seed=9).describe()["test"]["digest"]
