"""What stands on the command line is obeyed or refused, by every command; nothing is overlooked."""

import pytest

from ksuit_runner.cli.dispatch import _main
from ksuit_runner.config.overrides import value_of
from ksuit_runner.errors import ConfigError
from ksuit_runner.resume.request import Request, requested
from ksuit_runner.sweep.build_plan import plan_sweep

COMMANDS = (
    [],
    ["-m", "seed=0,1"],
    ["resume=last"],
    ["list=3"],
    ["sync=last"],
    ["leaderboard=x"],
    ["--cfg", "job"],
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("word", ["trainer.max_updates", "resumed", "ema"])
def test_a_word_that_means_nothing_is_refused(command, word):
    with pytest.raises(ConfigError, match=f"'{word}' is not an override: PATH=VALUE sets a value, ~PATH removes one"):
        _main([*command, word])


@pytest.mark.parametrize("key", ["resume", "fork", "evaluate", "sync", "list", "leaderboard", "sweep"])
@pytest.mark.parametrize("value", ["", "''", " "])
def test_an_empty_value_starts_nothing(key, value):
    with pytest.raises(ConfigError, match=f"{key}=: the value is empty, as with an unset variable of the shell"):
        _main([f"{key}={value}", "model=linear"])


def test_a_run_is_asked_for_once_however_it_is_written():
    assert value_of("resume", ["seed=1", "resume=null"]) is None
    assert requested(["model=cnn"]) is None
    for written in ("resume=abc", "++resume=abc", "resume='abc'", 'resume="abc"'):
        assert requested([written]) == Request("resume", "abc")
    for twice in (["resume=a", "resume=b"], ["fork=a", "++fork=b"]):
        with pytest.raises(ConfigError, match="given 2 times: a, b"):
            requested(twice)


def test_removals_count_in_sweeps_as_in_runs():
    for job in plan_sweep(["seed=0,1", "callbacks=[ema,accuracy]", "~callbacks.accuracy"], "command").jobs:
        assert list(job.config["callbacks"]) == ["ema"]


@pytest.mark.parametrize("setting", ["launcher=submitit", "launcher.max_jobs=2", "sweep.fail_fast=true"])
def test_what_is_about_a_sweep_is_not_ignored_without_one(setting):
    with pytest.raises(ConfigError, match=f"{setting}: this is about the runs of a sweep, and there is none"):
        _main([setting])


def test_a_launcher_that_a_file_chooses_is_not_ignored_without_a_sweep(tmp_path_factory, monkeypatch):
    project = tmp_path_factory.mktemp("project")
    (project / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /launcher: joblib\n"
    (project / "conf" / "experiment" / "far.yaml").write_text(text)
    monkeypatch.chdir(project)
    with pytest.raises(ConfigError, match="^launcher: joblib is for the runs of a sweep.*-m launcher=joblib"):
        _main(["experiment=far"])


def test_a_single_run_can_be_launched_as_a_sweep_of_one():
    (job,) = plan_sweep(["launcher=in_process", "seed=3"], "command").jobs
    assert job.combination == {} and job.config["seed"] == 3


def test_flags_may_stand_anywhere(capsys):
    for arguments in (["seed=7", "--cfg", "job", "name=x"], ["-c", "job", "seed=7", "name=x"]):
        with pytest.raises(SystemExit) as ended:
            _main(arguments)
            raise SystemExit(0)
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert "seed: 7" in printed and "name: x" in printed


@pytest.mark.parametrize("command", ["list=3", "sync=last"])
def test_a_query_takes_nothing_about_training(command):
    with pytest.raises(ConfigError, match=f"^\\+optimizer.lr=1: with {command.partition('=')[0]}= only output_dir, tr"):
        _main([command, "+optimizer.lr=1"])


@pytest.mark.parametrize("number", ["0", "-3", "three"])
def test_a_list_needs_a_number_of_runs(number):
    with pytest.raises(ConfigError, match=f"^list={number}: a number of runs is needed, or all$"):
        _main([f"list={number}"])


def test_a_list_of_no_runs_says_so(tmp_path, capsys):
    assert _main(["list"]) == 0
    assert capsys.readouterr().out == f"there is no run in {tmp_path / 'outputs'}\n"
