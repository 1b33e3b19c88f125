"""Small real runs without a config, for the tests of the core."""

import resource
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from command import end_started
from hypothesis import HealthCheck, settings
from run_maker import Maker

from ksuit_runner.paths import OutputPaths
from ksuit_runner.security.authorship import KEY_VARIABLE
from ksuit_runner.system.signals import SIGNALS
from ksuit_runner.tracker.mlflow import MlflowTracker

# Tests must not fail because the machine is busy.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# What is started by nohup or in the background of a script ignores these, and so would every run of the tests.
for number in SIGNALS:
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Run files with slow tests first: one that is begun last leaves all workers but one idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def maker(tmp_path):
    maker = Maker(tmp_path)
    yield maker
    maker.close()


def _plain(tree):
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.cpu().contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return tree


@pytest.fixture
def bits():
    """Convert a tree of tensors to plain values that are equal only if every bit is."""
    return _plain


@pytest.fixture(autouse=True, scope="session")
def _key(tmp_path_factory):
    """Sign configs with a key of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, str(tmp_path_factory.mktemp("state") / "key"))
        yield


@pytest.fixture(autouse=True)
def _processes():
    """End the processes of a failed test, so that they do not make the next one fail."""
    yield
    end_started()


@pytest.fixture
def full_disk():
    """Let no file grow, as on a full disk; databases and logs that are open cannot be written to either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with an empty store: creating one takes a second, copying it a millisecond."""
    folder = tmp_path_factory.mktemp("template")
    MlflowTracker(OutputPaths(folder))._experiment_id()
    return folder


@pytest.fixture
def paths(template: Path, tmp_path: Path) -> OutputPaths:
    shutil.copytree(template, tmp_path / "outputs")
    return OutputPaths(tmp_path / "outputs")
