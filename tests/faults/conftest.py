"""A project whose runs are killed, and the result of its uninterrupted run."""

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
    return Project(tmp_path_factory.mktemp("project"), Preloaded())


@pytest.fixture(scope="module")
def reference(project, template):
    """The result of the uninterrupted run."""
    project.clear(template)
    project.run()
    return project.result()
