import os
import re
import subprocess

from command import REPOSITORY


def make(*arguments, cwd=REPOSITORY):
    # Started by `make test` it would take over that make's flags and say which folder it enters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def test_help_lists_every_target_with_one_line():
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    listed = [line.split(maxsplit=2) for line in make("help").stdout.splitlines()]
    assert {words[1] for words in listed} == set(targets.split())
    assert all(len(words) == 3 for words in listed)
    assert make().stdout == make("help").stdout


def test_ui_without_a_run_says_what_comes_first(tmp_path):
    (tmp_path / "Makefile").write_text((REPOSITORY / "Makefile").read_text())
    result = make("ui", cwd=tmp_path)
    assert result.returncode != 0
    assert "make run" in result.stderr
