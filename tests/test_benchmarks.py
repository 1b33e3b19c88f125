"""The benchmarks run, from the first to the last, with sizes so small that they measure nothing."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import pytest
from benchmarks.__main__ import BENCHMARKS
from benchmarks.measure import Contest, Scale, Spread, compete
from benchmarks.result import Result
from command import REPOSITORY


def bench(*arguments):
    path = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1400, env=environment)


QUICK = ("metric_logging",)


def measured(folder, *names):
    path = folder / "found.json"
    done = bench(*names, "--tiny", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()) | {"printed": done.stdout}


def check(found, names):
    """Check that each benchmark measures something and compares it."""
    assert found["results"].keys() == set(names)
    for name, result in found["results"].items():
        assert result["values"], name
        assert result["aims"], name
        for entry in [*result["values"], *result["aims"]]:
            spread = entry["spread"]
            assert spread["low"] <= spread["median"] <= spread["high"], name
        assert f"### {result['title']}" in found["printed"]


@pytest.mark.soak
def test_every_benchmark_measures_something_and_compares_it(tmp_path):
    found = measured(tmp_path, *BENCHMARKS)
    check(found, BENCHMARKS)
    result = found["results"]["small_model"]
    for peer, package in (("Lightning", "lightning"), ("Trainer", "transformers"), ("Ignite", "pytorch-ignite")):
        has_part = peer in {value["name"] for value in result["values"]}
        is_named = any(note.startswith(f"{peer} is skipped: {package}") for note in result["notes"])
        assert has_part == is_installed(package) != is_named, peer


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_benchmark_measures_something_and_says_with_what(tmp_path):
    found = measured(tmp_path, *QUICK)
    check(found, QUICK)
    assert found["machine"]["versions"]["torch"] == version("torch")
    assert f"torch {version('torch')}" in found["printed"]
    assert "other processes took" in found["printed"]


@cache
def is_installed(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@pytest.mark.slow
def test_a_misspelt_benchmark_is_an_error():
    done = bench("smal_model")
    assert done.returncode == 2
    assert "there is no 'smal_model'" in done.stderr


def test_contestants_take_turns_in_alternating_order():
    calls = []
    compete({name: lambda name=name: calls.append(name) or 1.0 for name in "abc"}, rounds=3, warm_up=False)
    assert "".join(calls) == "abccbaabc"


def test_the_warm_up_does_not_count():
    costs = iter([100.0, 1.0, 2.0])
    assert compete({"one": lambda: next(costs)}, rounds=2).costs == {"one": [1.0, 2.0]}


def test_a_ratio_compares_neighbours():
    contest = Contest({"one": [1.0, 10.0, 100.0], "other": [2.0, 20.0, 200.0]})
    assert contest.ratio("one", "other") == Spread(0.5, 0.5, 0.5)
    assert contest.difference("other", "one").median == 10.0
    assert contest.spread("one").median == 10.0


def test_an_aim_is_reached_or_missed_by_its_median():
    result = Result("title")
    for median, at_least in ((1.0, False), (1.1, False), (1.0, True), (0.9, True)):
        result.aim("aim", Spread(median, 0.0, 9.0), 1.0, at_least=at_least)
    assert [aim.is_reached for aim in result.aims] == [True, False, True, False]
    assert [line.rsplit("| ", 1)[1] for line in result.markdown() if line.startswith("| aim")] == (
        ["reached |", "missed |"] * 2
    )


def test_sizes_and_rounds():
    assert Scale().turns(9) == 9
    assert Scale(rounds=3).turns(9) == 3
    assert Scale(is_tiny=True).turns(9) == 1
    assert Scale(is_tiny=True).pick("large", "small") == "small"
