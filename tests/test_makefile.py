import os
import re
import subprocess
import tomllib

import yaml
from command import REPOSITORY


def make(*arguments, cwd=REPOSITORY):
    # Started by `make test` it would take over that make's flags and say which folder it enters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def targets():
    (names,) = re.findall(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    return set(names.split())


def test_help_lists_every_target_with_one_line():
    listed = [line.split(maxsplit=2) for line in make("help").stdout.splitlines()]
    assert {words[1] for words in listed} == targets()
    assert all(len(words) == 3 for words in listed)
    assert make().stdout == make("help").stdout


def test_ui_without_a_run_says_what_comes_first(tmp_path):
    (tmp_path / "Makefile").write_text((REPOSITORY / "Makefile").read_text())
    result = make("ui", cwd=tmp_path)
    assert result.returncode != 0
    assert "make run" in result.stderr


def test_ci_runs_targets_on_every_python_that_is_promised():
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    test = "make test-${{ matrix.versions }} PYTHON=python"
    assert commands == {"make lint PYTHON=python", "make docs PYTHON=python", test}
    matrix = jobs["test"]["strategy"]["matrix"]
    assert {"lint", "docs", *(f"test-{versions}" for versions in matrix["versions"])} <= targets()

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    start = "Programming Language :: Python :: "
    assert [f"{start}{python}" for python in matrix["python"]] == [
        item for item in project["classifiers"] if item.startswith(start)
    ]
    assert project["requires-python"] == f">={matrix['python'][0]}"
