"""The text of ``--help``. Hydra's own takes twice the time, as it loads every group of the config again."""

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

from ksuit_runner.cli.arguments import as_overrides
from ksuit_runner.config.commented import commented
from ksuit_runner.config.compose import compose_with_choices
from ksuit_runner.config.groups import choices, files, groups
from ksuit_runner.errors import ConfigError, did_you_mean

_COMMANDS = """\
ksuit-runner trains a model as the config says, tracks it, and resumes it
exactly after whatever happened.

ksuit-runner ...
  init FOLDER                      a small project of your own, to begin with
  'callbacks=[ema,accuracy]'       choose callbacks
  model=mlp optimizer.lr=3e-4      any group, any value
  -m seed=0,1,2                    a sweep; or sweep=NAME
  resume=RUN_ID                    resume, bit for bit; also fork=, evaluate=
  list=10                          the newest runs; also `runs`, `show RUN` ...
  show=RUN_ID                      its config, metrics, checkpoints, commands
  report=RUN_ID                    all about it as one page of HTML
  compare RUN_ID RUN_ID            where runs differ
  predict=RUN_ID@best              its outputs on a dataset, as a file of numpy
  export=RUN_ID@best/ema           its weights, which the plain module loads
  sync=RUN_ID                      send what the tracker does not know of it
  find_batch_size=true model=gpt   largest parts of a batch that fit into memory
  leaderboard=last                 what the newest sweep has found
  resume=SWEEP_ID                  resume a sweep

RUN_ID is a run's id, its first 6 or more characters, its name, or `last`;
SWEEP_ID likewise, without `last`.
"""
_FLAGS = """\
Any value can be given as PATH=VALUE, such as trainer.max_epochs=20; +PATH=VALUE adds a key, and '~PATH' removes one.
--help GROUP shows all choices of a group, and --help CHOICE that one.
--cfg job prints the config and exits, also with resume=, fork=, evaluate=.
hydra.verbose=true shows the tracebacks of mistakes. --hydra-help shows the flags of Hydra, which composes the config.
"""


def print_help(words: Sequence[str]) -> int:
    """Print the commands, the groups with their choices, and the config with its comments; return 0.

    Args:
        words: Overrides that make the config; or groups and choices, whose files are shown instead.

    Raises:
        ConfigError: There is no such group or choice, or the overrides make no config.
    """
    if topics := [word for word in words if "=" not in word and not word.startswith("~")]:
        print("\n".join(map(_files_of, topics)), end="")
        return 0
    config, chosen = compose_with_choices(as_overrides(words))
    offered = ((group, choices(group)) for group in groups())
    listed = "".join(_wrapped(f"{group}: {', '.join(names)}\n", indent="  ") for group, names in offered if names)
    text = _with_wrapped_comments(commented(config, chosen))
    flags = "".join(map(_wrapped, _FLAGS.splitlines(keepends=True)))
    print(f"{_COMMANDS}\n== Groups: GROUP=CHOICE ==\n\n{listed}\n== Config ==\n\n{text}\n{flags}", end="")
    return 0


def _wrapped(line: str, indent: str = "", first_indent: str = "") -> str:
    """Return a line as several ones that fit the terminal, if it goes to one."""
    if not sys.stdout.isatty():
        return line
    filled = textwrap.fill(
        line,
        shutil.get_terminal_size().columns,
        initial_indent=first_indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"{filled}\n"


def _with_wrapped_comments(text: str) -> str:
    """Return YAML whose comments fit the terminal, if it goes to one; those that do stay as they are written."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns

    def wrap(comment: re.Match[str]) -> str:
        lines, mark = comment[0].splitlines(), f"{comment[1]}# "
        if max(map(len, lines)) <= width:
            return comment[0]
        return _wrapped(" ".join(line.removeprefix(mark) for line in lines), mark, mark)

    return re.sub(r"^( *)# .*\n(?:\1# .*\n)*", wrap, text, flags=re.MULTILINE)


def _files_of(name: str) -> str:
    """Return the files of a group, or those of a choice in whatever groups have one of that name, with comments."""
    offered = [(group, choice) for group in groups() for choice in choices(group)]
    shown = [pair for pair in offered if pair[0] == name] or [pair for pair in offered if pair[1] == name]
    if not shown and name not in groups():
        known = {*groups(), *(choice for _, choice in offered)}
        raise ConfigError(f"--help {name}: there is no such group or choice. {did_you_mean(name, known)}")
    texts = ((pair, files("/".join(pair))[0].read_text("utf-8", errors="replace")) for pair in shown)
    return "\n".join(f"== {group}={choice} ==\n\n{_with_wrapped_comments(text)}" for (group, choice), text in texts)
