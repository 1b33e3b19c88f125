"""``predict=``: what the model of a run predicts, in a file."""

import numpy as np
import pytest
import torch

from ksuit_runner import load_model, run
from ksuit_runner.cli.predict import predict
from ksuit_runner.data.digits import Digits
from ksuit_runner.errors import ConfigError

FEW = ("model=linear", "trainer.max_epochs=1", "tracker=noop", "callbacks=[ema]", "name=first")


class Unlabelled:
    """Samples to predict, of which nobody knows the labels."""

    def __init__(self):
        self.digits = Digits(split="test")

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        return self.digits[index][0]


class Unbuilt:
    """Samples that are not there any more."""

    def __init__(self, **settings):
        raise FileNotFoundError("the training samples are gone")


def test_predictions_are_what_the_loaded_model_returns_and_the_run_stays_as_it_is(tmp_path, capsys):
    run([f"output_dir={tmp_path}", *FEW])
    here, target = f"output_dir={tmp_path}", tmp_path / "predicted.npz"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    given = [here, "predict_on=test", "data.eval_batch_size=100", f"export_to={target}"]
    assert predict("first/ema", given) == 0
    assert f"359 samples of test: {target}" in capsys.readouterr().out
    dataset = Digits(split="test")
    inputs, targets = (torch.stack([torch.as_tensor(sample[part]) for sample in dataset]) for part in (0, 1))
    with torch.no_grad():
        expected = (
            load_model("first/ema", output_dir=tmp_path)(inputs),
            load_model("first", output_dir=tmp_path)(inputs),
        )
    with np.load(target) as found:
        assert np.allclose(found["outputs"], expected[0], atol=1e-6) and np.array_equal(found["targets"], targets)
        assert not np.allclose(found["outputs"], expected[1], atol=1e-6)
    unlabelled = ["+data.datasets.new._target_=test_predict.Unlabelled", "predict_on=new"]
    unlabelled += ["data.datasets.train._target_=test_predict.Unbuilt"]
    assert predict("first/ema", [here, *unlabelled, f"export_to={tmp_path / 'new.npz'}"]) == 0
    with np.load(target) as found, np.load(tmp_path / "new.npz") as new:
        assert set(new) == {"outputs"} and np.allclose(new["outputs"], found["outputs"], atol=1e-6)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before
    for wrong, words in (
        (given, "exists, and is not overwritten"),
        ([here, "predict_on=tset"], "Did you mean 'test'"),
        ([here, f"export_to={tmp_path / 'x.csv'}"], "has to end in .npz"),
        ([here, "optimizer.lr=1"], "with predict= only"),
        (
            [here, "data=diabetes", f"export_to={tmp_path / 'other.npz'}"],
            r"the model of the run cannot take float32 \(",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            predict("first", wrong)
    with pytest.raises(ConfigError, match="predict=first@best: run .* has no checkpoint 'best'"):
        predict("first@best", [here])
