"""Words of a command line that mean nothing: what is said, and what to write instead."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ksuit_runner import __version__
from ksuit_runner.cli.dispatch import _main
from ksuit_runner.config.groups import choices
from ksuit_runner.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def refusal(*arguments):
    with pytest.raises(ConfigError) as raised:
        _main(arguments)
    return str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["lr=0.1"], "Did you mean optimizer.lr=0.1?"),
        (["epochs=3"], "Did you mean trainer.max_epochs=3?"),
        (["--max_epochs", "3"], "Write trainer.max_epochs=3"),
        (["--max-epochs=3", "seed=1"], "Write trainer.max_epochs=3"),
        (["-lr", "0.1"], "Write optimizer.lr=0.1"),
        (["--model", "mlp"], "Write model=mlp"),
        (["--resume", "last"], "Write resume=last"),
        (["--wandb"], "PATH=VALUE sets a value"),
        (["--optimizer.lr=0.1"], "Write optimizer.lr=0.1"),
        (["optimizer.lr: 0.1"], "Did you mean optimizer.lr=0.1?"),
        (["model=MLP"], "Did you mean 'mlp'?"),
        (["optimzer.lr=1"], "Did you mean 'optimizer'?"),
        (["mine.lr=1"], "To add a new key, write +mine.lr=1"),
        (["optimizer.lr", "=", "0.1"], "Write optimizer.lr=0.1"),
        (["optimizer.lr=", "0.1"], "Write optimizer.lr=0.1"),
        (["seed=1", "optimizer.lr", "=0.1"], "Write optimizer.lr=0.1"),
        (["optimizer.lr = 0.1"], "Write optimizer.lr=0.1"),
        (["callbacks=[ema,", "accuracy]", "seed=1"], "needs quotes. Write 'callbacks=[ema, accuracy]'"),
        (["seed=1", "trainer.parameter_rules={a:", "{lr:", "1}}"], "Write 'trainer.parameter_rules={a: {lr: 1}}'"),
        (["resume", "last", "callbacks=[ema,", "accuracy]"], "Write 'callbacks=[ema, accuracy]'"),
        (["-m", "seed=0,", "1"], "Write 'seed=0, 1'"),
        (["show"], "show: it takes a run, such as last, and nothing is given"),
        (["show", "last", "a"], "show: it takes a run, such as last, and 2 words are given"),
        (["~callbacks"], "For none of them, write 'callbacks=[]'"),
        (["~callbacks=ema"], "for all but one, '~callbacks.ema'"),
        (["~lr"], "Did you mean '~optimizer.lr'?"),
        (["~optimizer.lrr"], "Did you mean '~optimizer.lr'?"),
        (["~nothing"], "there is no 'nothing' to remove"),
        (["+experiment=python_docs"], "Without the +: experiment=python_docs"),
        (["+model=mlp"], "Without the +: model=mlp"),
        (["trainer.parameter_rules=[a]"], "'trainer.parameter_rules' is a mapping: {KEY: VALUE}"),
        (["+callbacks={ema: 3"], "+callbacks={ema: 3: "),
        (["train"], "To train, leave it out"),
        (["help"], "Did you mean --help?"),
        (["shwo", "last"], "Did you mean the command 'show'?"),
        (["mlp"], "Did you mean model=mlp?"),
        (["ema"], "Did you mean 'callbacks=[ema]'?"),
        (["model", "mlp"], "Did you mean model=NAME?"),
        (["trainer.max_epochs"], "Did you mean trainer.max_epochs=VALUE?"),
        (["--help", "optimiser"], "Did you mean 'optimizer'?"),
        (
            ["callbacks=accuracy,ema"],
            "written as 'callbacks=[accuracy,ema]'; for a run with each of them, add -m",
        ),
        (["--cfg", "jobs"], "invalid choice: 'jobs'"),
        (["--config-name", "mine"], "Choose one of a group: experiment=NAME"),
        (["conf/model/mlp.yaml"], "Did you mean model=mlp?"),
        (["\N{EN DASH}m"], "begins with a long dash, as editors make it. Write -m"),
        (["name=it's"], 'it cannot be read at "\'s"; a bracket, brace or quote needs its partner. Text with'),
        (["hydra.verbose=ema"], "true or false is needed"),
    ],
)
def test_what_is_meant_is_said(arguments, meant):
    assert meant in refusal(*arguments)


@pytest.mark.parametrize("override", ["+experiment=", "output_dir=", "initialize.from=", "name= "])
def test_an_unset_variable_starts_nothing(override):
    key = override.strip("+ =")
    message = refusal(override, "seed=1")
    assert "the value is empty, as with an unset variable of the shell" in message
    assert message.endswith(f"For none, write {key}=null")


@pytest.mark.parametrize("file", ["config/callbacks/mine.yaml", "conf/callbacks/mine.yml"])
def test_a_file_in_the_wrong_place_is_found(tmp_path, monkeypatch, file):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("mine:\n  _target_: callbacks.ema.Ema\n")
    monkeypatch.chdir(tmp_path)
    assert f"{file} has to be conf/callbacks/mine.yaml" in refusal("callbacks=[mine]")


def test_a_key_of_a_file_without_its_node_is_found(tmp_path, monkeypatch):
    path = tmp_path / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\nlr: 0.1\n")
    monkeypatch.chdir(tmp_path)
    assert refusal("experiment=mine").endswith("(conf/experiment/mine.yaml). Did you mean `optimizer: {lr: VALUE}`?")


@pytest.mark.parametrize("here", ["project/conf", "."])
def test_a_file_of_a_project_around_is_found(tmp_path, monkeypatch, here):
    path = tmp_path / "project" / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\n")
    monkeypatch.chdir(tmp_path / here)
    assert f"'mine'. {tmp_path}/project/conf has it: cd {tmp_path}/project" in refusal("experiment=mine")


def test_help_shows_what_each_key_is_for(capsys):
    assert _main(["--help", "optimizer=sgd"]) == 0
    printed = capsys.readouterr().out
    assert "# seed of every random draw of the run\nseed: 0\n" in printed
    assert "  # Nesterov momentum\n  nesterov: true\n" in printed
    assert "    # decays, one average for each" in printed
    config = printed.partition("== Config ==\n\n")[2].partition("\n\nAny value")[0].splitlines()
    keys = [pair for pair in pairwise(config) if re.match(r" *\w+:", pair[1]) and "_target_" not in pair[1]]
    bare = [line for before, line in keys if not before.lstrip().startswith("#")]
    assert len(keys) > 100 and set(bare) <= {"trainer:", "data:"}, bare


@pytest.mark.parametrize("group", [None, "trainer"])
def test_help_fits_a_terminal(capsys, monkeypatch, group):
    arguments = ["--help", *([group] if group else [])]
    assert _main(arguments) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert _main(arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 < max(map(len, plain.splitlines()))
    assert printed.replace("#", "").split() == plain.replace("#", "").split()


@pytest.mark.parametrize("group", ["optimizer", "callbacks"])
def test_help_of_a_group_shows_its_files(capsys, group):
    assert _main(["--help", group]) == 0
    printed = capsys.readouterr().out
    for choice in choices(group):
        assert f"== {group}={choice} ==\n\n{(REPOSITORY / 'conf' / group / f'{choice}.yaml').read_text()}" in printed


def test_a_file_that_cannot_be_read_does_not_keep_help_from_others(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    broken = {
        "tab": b"_target_: mine.Net\n\twidth: 16\n",
        "alias": b"width: *a\n",
        "latin": b"# Gr\xf6\xdfe\nwidth: 1\n",
    }
    for name, content in broken.items():
        (folder / f"{name}.yaml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert _main(["--help"]) == 0
    assert "# seed of every random draw of the run\nseed: 0\n" in capsys.readouterr().out
    assert _main(["--help", "model"]) == 0
    printed = capsys.readouterr().out
    assert "== model=alias ==" in printed and "== model=latin ==" in printed and "\twidth: 16" in printed
    assert refusal("model=tab").startswith("conf/model/tab.yaml, line 2: found character")


def test_help_of_a_choice_shows_its_file(capsys):
    assert _main(["--help", "ema", "adamw"]) == 0
    files = (("callbacks", "ema"), ("optimizer", "adamw"))
    texts = [(REPOSITORY / "conf" / group / f"{name}.yaml").read_text() for group, name in files]
    heads = [f"== {group}={name} ==\n\n" for group, name in files]
    assert capsys.readouterr().out == "\n".join(map("".join, zip(heads, texts, strict=True)))
    assert refusal("--help", "emma") == "--help emma: there is no such group or choice. Did you mean 'ema'?"


def test_the_version_is_that_of_the_runner(capsys):
    assert _main(["--version"]) == 0
    assert capsys.readouterr().out == f"ksuit_runner {__version__}\n"
