"""What ships learns: compared with what is known without learning."""

import pytest
import torch
from command import journal, run_dir
from preloaded import ksuit

from ksuit_runner.data.python_docs import VOCABULARY, PythonDocs


def last(directory, key):
    points = journal(directory)
    return points[key, max(step for name, step in points if name == key)]


def test_diabetes_beats_the_mean_predictor(tmp_path):
    ksuit(tmp_path, "experiment=diabetes", "tracker=noop")
    # Targets are standardized: predicting the mean has an error of about 1.
    assert last(run_dir(tmp_path), "loss/test/best") < 0.7
    assert last(run_dir(tmp_path), "loss/test/best/ema") < 0.7


@pytest.mark.slow
def test_gpt_gets_clearly_below_the_entropy_of_the_characters(tmp_path):
    ksuit(
        tmp_path,
        "experiment=python_docs",
        "tracker=noop",
        "model.depth=2",
        "model.embed_dim=64",
        "trainer.max_epochs=2",
    )
    # The best model without context predicts the frequencies of the characters; one more of each, so that none is 0.
    train, test = (PythonDocs(split).targets.flatten() for split in ("train", "test"))
    counts = torch.bincount(train, minlength=len(VOCABULARY)) + 1.0
    entropy = torch.nn.functional.cross_entropy((counts / counts.sum()).log().expand(len(test), -1), test).item()
    assert last(run_dir(tmp_path), "loss/test/best") < 0.75 * entropy
