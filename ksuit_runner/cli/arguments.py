"""Reads the words of a command line: flags of Hydra, overrides, and commands, and refuses what is none of these."""

import re
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from ksuit_runner.config.compose import refuse_long_overrides, refuse_lost_overrides
from ksuit_runner.config.explain import IN_CONF, paths_named
from ksuit_runner.config.groups import choices, groups
from ksuit_runner.config.overrides import bare_name, shell_word
from ksuit_runner.errors import ConfigError, suggest
from ksuit_runner.record.mode import OF_STORED_RUNS

COMMANDS = {
    "init": ("cli.init", "init"),
    "sync": ("cli.sync", "sync"),
    "annotate": ("cli.annotate", "annotate"),
    "list": ("cli.list_runs", "list_runs"),
    "show": ("reports.show", "show"),
    "predict": ("cli.predict", "predict"),
    "report": ("reports.report", "report"),
    "export": ("cli.export", "export"),
    "compare": ("reports.compare", "compare"),
    "leaderboard": ("sweep.commands", "show_leaderboard"),
    "find_batch_size": ("cli.find_batch_size", "find_batch_size"),
}
"""Key of a command that trains nothing -> its module and function, which gets the value of the key."""
_WORDS = (*COMMANDS, *OF_STORED_RUNS)
# word of a command -> what it is about if nothing else is said
_ALONE = {"list": "20", "runs": "20", "find_batch_size": "true"}
_TAKE = {"init": "a folder", "list": "a number, or all", "leaderboard": "a sweep, such as last"}
_TRAINS = ("train", "run", "fit", "start")
_FLAGS = ("help", "version")
_CONFIG_FLAGS = ("-cp", "-cn", "-cd")
_LONG_DASHES = ("\N{EN DASH}", "\N{EM DASH}")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of Hydra, with what belongs to them, and all other words.

    Raises:
        ConfigError: There is no such flag.
    """
    parser = get_args_parser()
    _refuse_unknown_flags(arguments, list(parser._option_string_actions))
    parser.error = _refuse  # type: ignore[method-assign]
    words = list(parser.parse_intermixed_args(list(arguments)).overrides)
    return [item for item in arguments if item not in words], words


def as_overrides(words: Sequence[str]) -> list[str]:
    """Return the overrides that words stand for: ``show RUN`` is ``show=RUN``, ``compare A B`` is ``compare=[A,B]``.

    Raises:
        ConfigError: A command has too few or too many words, or a word is no override, or has no meaning before Hydra
            is asked.
    """
    overrides = _commands_as_overrides(words)
    check_overrides(overrides)
    return overrides


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


def check_overrides(overrides: Sequence[str]) -> None:
    """Check what Hydra would say too late, too slowly, or not at all.

    Raises:
        ConfigError: An override has no meaning before Hydra is asked.
    """
    _refuse_spaces(overrides)
    for item in overrides:
        key, equals, value = item.partition("=")
        if item.startswith(_LONG_DASHES):
            raise ConfigError(f"'{item}' begins with a long dash, as editors make it. Write -{item[1:]}")
        if not equals and not item.startswith("~"):
            raise ConfigError(f"'{item}' is not an override: PATH=VALUE sets a value, ~PATH removes one{_meant(item)}")
        if equals and not value.strip():
            raise ConfigError(
                f"{key}=: the value is empty, as with an unset variable of the shell. For none, write "
                f"{bare_name(item)}=null"
            )
    refuse_long_overrides(overrides)
    refuse_lost_overrides(overrides)


def _commands_as_overrides(given: Sequence[str]) -> list[str]:
    command, *words = [item for item in given if "=" not in item and not item.startswith("~")] or [""]
    key = "list" if command == "runs" else command
    if key not in _WORDS:
        return list(given)
    if key == "compare":
        value = f"[{','.join(words)}]"
    elif command in _ALONE and not words:
        value = _ALONE[command]
    elif len(words) == 1:
        value = words[0]
    else:
        _refuse_spaces(given)  # one of the words may be the rest of an override
        what = _TAKE.get(key, "a run, such as last")
        number = f"{len(words)} words are" if words else "nothing is"
        raise ConfigError(f"{command}: it takes {what}, and {number} given")
    return [f"{key}={value}", *(item for item in given if item not in (command, *words))]


def _refuse_unknown_flags(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Refuse ``--max_epochs 3``, which other programs take."""
    for index, item in enumerate(arguments):
        flag, _, value = item.partition("=")
        if flag.startswith("--config") or flag in _CONFIG_FLAGS:
            raise ConfigError(
                f"{flag}: a config is composed from the files in conf/, and conf/config.yaml is the first of them. "
                "Choose one of a group: experiment=NAME"
            )
        is_long = flag.startswith("--") and len(flag) > 2
        is_known = flag in known or (is_long and any(name.startswith(flag) for name in known))  # argparse completes it
        if is_known or not (is_long or re.match(r"-[a-zA-Z]", flag)):
            continue
        name, after = flag.lstrip("-").replace("-", "_"), arguments[index + 1 : index + 2]
        if not value:
            value = next((word for word in after if "=" not in word and not word.startswith("--")), "VALUE")
        paths = [name] if name in _top_level() or "." in name else paths_named(name)
        meant = f"Write {' or '.join(f'{path}={value}' for path in paths)}" if paths else "PATH=VALUE sets a value"
        raise ConfigError(f"{flag}: there is no such flag, and values are set without dashes. {meant}")


def _refuse_spaces(words: Sequence[str]) -> None:
    """Refuse ``optimizer.lr = 0.1`` and ``callbacks=[ema, accuracy]``, of which the shell makes several words."""
    for index, word in enumerate(words):
        key, equals, value = word.partition("=")
        before, after = ("".join(words[at : at + 1] if at >= 0 else ()) for at in (index - 1, index + 1))
        is_split = (not key and before and "=" not in before) or (not value.strip() and after and "=" not in after)
        if equals and (is_split or key != key.strip()):
            whole = f"{key.strip() or before}={value.strip() or after}"
            raise ConfigError(f"'{word}': an override has no spaces around its =. Write {whole}")
        is_cut = equals and (value.endswith(",") or _is_open(word)) and after and "=" not in after
        if is_cut:
            ends = (end for end in range(index + 2, len(words)) if not _is_open(" ".join(words[index:end])))
            whole = " ".join(words[index : next(ends, len(words))])
            raise ConfigError(f"'{word}': an override with spaces needs quotes. Write {shell_word(whole)}")


def _is_open(text: str) -> bool:
    """Whether a list or mapping begins in a text and does not end there."""
    return any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}"))


def _meant(word: str) -> str:
    """Return what a word that means nothing may have been meant to say, to be appended to a message."""
    if word in _TRAINS:
        return ". To train, leave it out"
    if word in _FLAGS:
        return f". Did you mean --{word}?"
    if in_conf := IN_CONF.search(word):
        return f". Did you mean {in_conf[1]}={in_conf[2]}?"
    if colon := re.match(r"([\w.]+): ?(.+)", word):
        return f". Did you mean {colon[1]}={colon[2]}?"
    if near := suggest(word, (*_WORDS, "runs")):
        return f". Did you mean the command '{near}'?"
    if word in _top_level():
        return f". Did you mean {word}={'NAME' if word in groups() else 'VALUE'}?"
    found = [group for group in groups() if word in choices(group)]
    paths = [] if found else paths_named(bare_name(word).rpartition(".")[2])
    meant = [*(f"'{group}=[{word}]'" if group == "callbacks" else f"{group}={word}" for group in found)]
    meant += [f"{path}=VALUE" for path in paths]
    return f". Did you mean {' or '.join(meant)}?" if meant else ""


def _top_level() -> set[str]:
    return {*groups(), *_WORDS, "name", "seed", "output_dir", "ranks", "objective"}
