"""What README and the guides tell a user to type: README's commands run, those of the guides pass all checks."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from command import REPOSITORY, journal, run_dir, run_dirs
from preloaded import ksuit

from ksuit_runner.cli.dispatch import _main
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config
from ksuit_runner.errors import ConfigError
from ksuit_runner.sweep.build_plan import plan_sweep

pytestmark = pytest.mark.slow
README = (REPOSITORY / "README.md").read_text()
GUIDES = [path for path in sorted((REPOSITORY / "docs").glob("*.md")) if path.name != "tutorial.md"]
TRAINS = ("", "callbacks", "model", "sweep", "ranks", "resume", "fork")
OWN = {f"conf/{name}/lm.yaml": "# @package _global_\n" for name in ("experiment", "sweep")}
OWN["conf/sweep/lm.yaml"] += "objective: loss/validation\nsweep: {params: {seed: [0, 1]}}\n"


def commands_in(text):
    """Return the arguments of every command: a line of code, or within a line of text."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^(?:srun )?ksuit-runner\b(.*)$|`ksuit-runner ([^`]+)`", text, re.MULTILINE)
    return [shlex.split("".join(line), comments=True) for line in lines]


def first_word(arguments):
    return arguments[0].partition("=")[0] if arguments else ""


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Follow README in an empty folder, with runs of one epoch, and return the folder."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for given in commands_in(README):
            arguments, word = [*given], first_word(given)
            if any("RUN_ID" in item for item in given):
                first = run_dirs(Path("outputs"))[0].name
                arguments = [item.replace("RUN_ID", first) for item in given]
            if word in TRAINS:
                arguments.append(f"trainer.max_epochs={2 if word in ('resume', 'fork') else 1}")
            arguments += {"sweep": ["sweep.params.seed=[0]"], "ranks": ["--cfg", "job"]}.get(word, [])
            patch.setattr(sys, "argv", ["ksuit-runner", *arguments])
            assert _main(arguments) == 0, given
    return folder


def test_the_commands_of_readme(followed, monkeypatch, capsys):
    monkeypatch.chdir(followed)
    made = {path.suffix: path for path in followed.iterdir()}
    assert {".npz", ".html", ".safetensors"} <= made.keys() and (followed / "my_project").is_dir()
    assert len(np.load(made[".npz"])["outputs"]) == 359
    assert [*followed.glob("outputs/compare-*.png")]

    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    names = {}
    exec(code.replace('"model=mlp"', '"model=mlp", "trainer.max_epochs=1"'), names)
    assert names["result"].status == "FINISHED" and not names["model"].training


@pytest.mark.parametrize("page", GUIDES, ids=lambda path: path.name)
def test_the_commands_of_a_guide(page, followed, monkeypatch):
    text = page.read_text()
    write_files(OWN | files_in(text), followed)
    mistakes = dict(re.findall(r"^\$ ksuit-runner (.*)\n(?:.*\n)*?error: (.*)$", text, re.MULTILINE))
    for given in commands_in(text):
        experiment = next((item.partition("=")[2] for item in given if item.startswith("experiment=")), "none")
        example = REPOSITORY / "examples" / experiment
        monkeypatch.chdir(example if example.is_dir() else followed)
        monkeypatch.syspath_prepend(Path.cwd())
        if given not in commands_in(README):
            check(given)
    for line, said in mistakes.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            compose_config(shlex.split(line))


def test_what_has_moved_here_trains_and_what_it_was_compiles(tmp_path):
    text = (REPOSITORY / "docs" / "migrate.md").read_text()
    write_files(files_in(text), tmp_path)
    (command,) = [given for given in commands_in(text) if given[-1].startswith("+callbacks")]
    ksuit(tmp_path / "outputs", *command, "trainer.max_epochs=1", cwd=tmp_path)
    assert {("loss/test", 15), ("hits/test", 15)} <= journal(run_dir(tmp_path / "outputs")).keys()
    before = re.findall(r"^```python\n# before: (\w+\.py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in before] == ["loop.py", "lit.py", "reviews.py"]
    for name, code in before:
        compile(code, name, "exec")


def files_in(text):
    """Return the files that a page shows, with their names in the first line."""
    shown = re.findall(r"^```\w+\n# ([\w/]+\.(?:py|yaml))\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return dict(shown)


def write_files(files, folder):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def check(given):
    """Check a command as it would be checked before data is loaded, or do what only prints."""
    word, text = first_word(given), shlex.join(given)
    first = run_dirs(Path("outputs"))[0].name if "RUN_ID" in text else ""
    arguments = [item.replace("RUN_ID", first) for item in given]
    if word in ("--help", "leaderboard"):
        assert _main(arguments) == 0
    elif word == "resume" and "RUN_ID" in text:
        assert _main([*arguments, "--cfg", "job"]) == 0
    elif word == "-m" or any(item.startswith("sweep=") for item in given):
        plan_sweep([item for item in arguments if item != "-m"], text)
    elif not re.search("[A-Z]{4}", text):  # a name to be replaced by one's own
        check_config(compose_config([item for item in arguments if item != "find_batch_size"]))
