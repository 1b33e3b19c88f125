"""Runs that were stored before evaluations had a dataset of their own go on with the one that they had."""

import pytest
from omegaconf import OmegaConf

from ksuit_runner.config.check.whole_config import resolve
from ksuit_runner.config.compose import compose_config
from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.stored_run import Launch, store
from ksuit_runner.resume.changes import compose_stored


@pytest.fixture
def old(tmp_path):
    """A stored run without ``evaluation``, which has no validation set."""
    config = resolve(compose_config(["callbacks=[accuracy]", "evaluation.dataset=test", f"output_dir={tmp_path}"]))
    config = {key: value for key, value in config.items() if key not in ("evaluation", "sweep", "launcher", "hydra")}
    del config["data"]["datasets"]["validation"], config["data"]["datasets"]["train"]["validation_fraction"]
    paths = PathProvider(tmp_path, "run00000")
    store(paths, config, Launch("", []))
    return paths


def test_what_is_chosen_anew_evaluates_its_test_set(old):
    composed = compose_stored(Mode.RESUME, old, ["callbacks=[accuracy,best_checkpoint]", "trainer.max_epochs=30"])
    found = OmegaConf.to_container(composed.config)["callbacks"]
    assert found["accuracy"]["dataset_key"] == "test"
    assert found["best_checkpoint"]["metric_key"] == "accuracy/test"
    assert not [path for path in composed.changes if path.startswith(("data", "evaluation"))]


def test_a_resume_without_changes_has_none(old):
    assert compose_stored(Mode.RESUME, old, []).changes == []


def test_another_dataset_for_callbacks_that_name_theirs_is_refused(old):
    with pytest.raises(ConfigError, match=r"evaluation.dataset: it would have no effect: .*dataset_key=train"):
        compose_stored(Mode.EVALUATE, old, ["evaluation.dataset=train"])
    composed = compose_stored(Mode.EVALUATE, old, ["evaluation.dataset=train", "callbacks=[loss]"])
    assert composed.config.callbacks.loss.dataset_key == "train"


def test_of_a_stored_run_what_is_added_now_is_checked_and_nothing_else(old):
    stored = compose_stored(Mode.EVALUATE, old, []).config
    store(old, {**resolve(stored), "optimzer": {"lr": 1}}, Launch("", ["+optimzer.lr=1"]))  # an old one
    assert compose_stored(Mode.EVALUATE, old, ["+paper=3", "callbacks=[loss]"]).config.paper == 3
    for mode in Mode:
        with pytest.raises(ConfigError, match="^traner: the config has no such key.* 'trainer'"):
            compose_stored(mode, old, ["+traner.max_epochs=9"])
