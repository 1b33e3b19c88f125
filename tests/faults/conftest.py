"""A project whose runs are killed, and what is left of the run that never was."""

import pytest
from crashes import Project
from preloaded import Preloaded

from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker import mlflow_store as embedded


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """An output folder with an empty database: creating one takes a second, copying it a millisecond."""
    folder = tmp_path_factory.mktemp("template")
    embedded.open_store(OutputPaths(folder))
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose runs are killed."""
    return Project(tmp_path_factory.mktemp("project"), Preloaded())


@pytest.fixture(scope="module")
def reference(project, template):
    """What the run that was never killed has left."""
    project.clear(template)
    project.run()
    return project.result()
