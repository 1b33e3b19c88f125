"""Overrides on a stored config: today's YAML files count for what is chosen anew, and for nothing else."""

import pytest
from omegaconf import OmegaConf

from ksuit_runner.config.check.whole_config import resolve
from ksuit_runner.config.compose import compose_config, without_sweep
from ksuit_runner.config.differences import differences
from ksuit_runner.errors import ConfigError
from ksuit_runner.resume.recompose import with_overrides


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose YAML files are no longer those that the stored config came from."""
    (tmp_path / "conf" / "callbacks").mkdir(parents=True)
    (tmp_path / "conf" / "experiment").mkdir()
    (tmp_path / "conf" / "callbacks" / "accuracy.yaml").write_text(
        "accuracy:\n  _target_: callbacks.accuracy.Accuracy\n  dataset_key: test\n  every_n_epochs: 7\n"
    )
    (tmp_path / "conf" / "callbacks" / "early_stop.yaml").write_text(
        "early_stop:\n  _target_: callbacks.early_stop.EarlyStop\n  metric_key: ${objective}\n  patience: ${seed}\n"
    )
    (tmp_path / "conf" / "experiment" / "long.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /schedule: constant\ntrainer:\n  max_epochs: 99\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def stored():
    overrides = [
        "model=linear",
        "seed=5",
        "callbacks=[ema,accuracy]",
        "objective=accuracy/validation",
        "optimizer.lr=0.5",
    ]
    config = resolve(without_sweep(compose_config(overrides)))
    config["model"]["gone"] = "of a version before"
    return config


def changes(stored, *overrides):
    found = differences(stored, resolve(with_overrides(OmegaConf.create(stored), overrides)))
    return {path: new for path, _, new in found}


def test_values_are_set_added_and_removed(project, stored):
    found = changes(
        stored, "trainer.max_epochs=3", "+model.new=${seed}", "~callbacks.ema", "++optimizer.lr=1", "name='a b'"
    )
    assert found["trainer.max_epochs"] == 3
    assert found["model.new"] == 5
    assert found["optimizer.lr"] == 1
    assert found["name"] == "a b"
    assert {place.partition(".")[0] for place in found} == {"trainer", "model", "optimizer", "name", "callbacks"}
    assert [place for place in found if place.startswith("callbacks")] == ["callbacks.ema"]


def test_a_chosen_group_is_todays_and_refers_to_the_stored_config(project, stored):
    found = resolve(with_overrides(OmegaConf.create(stored), ["callbacks=[accuracy,early_stop]"]))["callbacks"]
    assert list(found) == ["accuracy", "early_stop"]
    assert found["accuracy"]["every_n_epochs"] == 7
    assert found["early_stop"]["metric_key"] == "accuracy/validation" and found["early_stop"]["patience"] == 5


def test_groups_can_be_added_to_and_given_with_values_in_them(project, stored):
    given = ["+callbacks=early_stop", "callbacks.early_stop.patience=2", "+callbacks=loss"]
    found = resolve(with_overrides(OmegaConf.create(stored), given))["callbacks"]
    assert list(found) == ["ema", "accuracy", "early_stop", "loss"]
    assert found["early_stop"]["patience"] == 2
    assert found["accuracy"] == stored["callbacks"]["accuracy"]
    assert changes(stored, "callbacks=[]") == {"callbacks": {}}


def test_an_experiment_changes_what_it_changes_in_the_default_config(project, stored):
    found = changes(stored, "experiment=long")
    assert found.pop("trainer.max_epochs") == 99
    assert found and all(place.startswith("schedule") for place in found)
    assert changes(stored, "experiment=long", "trainer.max_epochs=4", "schedule=cosine") == {"trainer.max_epochs": 4}


def test_what_data_brings_comes_with_it_unless_it_is_chosen(project, stored):
    found = resolve(with_overrides(OmegaConf.create(stored), ["data=diabetes"]))
    assert "diabetes" in found["data"]["datasets"]["train"]["_target_"] and "MSE" in found["loss"]["_target_"]
    chosen = resolve(with_overrides(OmegaConf.create(stored), ["data=diabetes", "callbacks=[accuracy]"]))
    assert list(chosen["callbacks"]) == ["accuracy"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.x=1", "modle.x=1: 'modle' has no 'x'|the config has no 'modle'"),
        ("model.in=1", "model.in=1: 'model' has no 'in'. Valid: _target_, gone"),
        ("callbacks=[accuracyy]", "callbacks: there is no 'accuracyy'. Did you mean 'accuracy'"),
        ("~callbacks.loss", "there is no 'callbacks.loss' to remove"),
        ("+seed=3", "An item is already at 'seed'"),
        ("callbacks.ema={}", "callbacks.ema={}: it would change nothing, .* write ~callbacks.ema"),
        ("seed=1,2", "seed=1,2: a stored run takes one value, not a sweep"),
        ("name=${hydra:job.name}", "a stored run is not composed by Hydra again; write the value itself"),
        ("seed", "seed: "),
    ],
)
def test_mistakes_are_said_about_the_stored_config(project, stored, override, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(OmegaConf.create(stored), [override])
