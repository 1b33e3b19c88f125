"""What a project's own code imports from ``ksuit_runner`` itself."""

import ast
import subprocess
import sys
from importlib import import_module

import pytest
from command import REPOSITORY

import ksuit_runner
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.errors import ConfigError

# Torch is imported once, and by itself; then each name is the first one that its process asks for.
EACH_FIRST = """
import os, sys
import ksuit_runner
dir(ksuit_runner)
from ksuit_runner import ConfigError, Interval, Launcher, PathProvider, StopTraining, UpdateCounter
assert not sys.modules.keys() & {"torch", "mlflow"}
for name in [name for name in sys.modules if name.startswith("ksuit_runner.")]:
    del sys.modules[name]
for name in ksuit_runner.__all__:
    vars(ksuit_runner).pop(name, None)
import torch
for name in ksuit_runner.__all__:
    if os.fork() == 0:
        exec(f"from ksuit_runner import {name}")
        assert getattr(ksuit_runner, name).__name__ == name
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


def test_each_name_can_be_the_first_that_is_imported():
    done = subprocess.run([sys.executable, "-c", EACH_FIRST], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["metric_callback.MetricCallback", "periodic_callback.DatasetCallback"])
def test_the_modules_that_the_changelog_keeps_have_the_same_classes(name):
    module, _, name = name.partition(".")
    assert getattr(import_module(f"ksuit_runner.{module}"), name) is getattr(ksuit_runner, name)


def test_every_name_is_listed_once():
    assert sorted(ksuit_runner._MODULES) == ksuit_runner.__all__
    assert set(ksuit_runner.__all__) <= set(dir(ksuit_runner))
    with pytest.raises(AttributeError, match="module 'ksuit_runner' has no attribute 'CallbackBas'"):
        _ = ksuit_runner.CallbackBas


def test_the_types_of_every_name_are_checked():
    code = ast.parse((REPOSITORY / "tests" / "consumer.py").read_text()).body
    (names,) = (node.names for node in code if isinstance(node, ast.ImportFrom) and node.module == "ksuit_runner")
    assert [item.name for item in names] == ksuit_runner.__all__


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer._target_=ksuit_runner.SgdTrainr", "there is no 'SgdTrainr' in 'ksuit_runner'. Did you mean 'SgdTr"),
        ("trainer._target_=ksuit_runner.CallbackBase", "'ksuit_runner.CallbackBase' does not derive from SgdTrainer"),
    ],
)
def test_a_mistake_in_such_a_name_is_found_before_anything_is_created(override, message):
    with pytest.raises(ConfigError) as error:
        check_config(compose_config([override]))
    assert str(error.value).startswith(f"trainer._target_: {message}")


def test_their_arguments_are_checked_as_ever():
    short = ["trainer._target_=ksuit_runner.SgdTrainer", "+trainer.max_epoch=3"]
    with pytest.raises(ConfigError, match="trainer.max_epoch: there is no such argument. Did you mean 'max_epochs'?"):
        check_config(compose_config(short))
