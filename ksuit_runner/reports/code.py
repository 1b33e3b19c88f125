"""The code that runs were started from: commit and branch, and what was not committed."""

import re
from collections.abc import Iterator, Sequence

from ksuit_runner.reports.facts import StoredRun

SHORT_COMMIT = 12
_COMMIT = re.compile("[0-9a-f]{7,64}")
_UNTRACKED = "# untracked: "
_FILE = re.compile(r"^diff --git a/.* b/(.*)$")


def code_facts(run: StoredRun) -> dict[str, str]:
    """Return commit and branch of a run, and for each file with uncommitted changes how many lines they add and remove.

    Without git there are none.
    """
    known = run.environment
    facts = {"commit": _commit(run)[:SHORT_COMMIT], "branch": str(known.get("git.branch") or "")}
    for name, lines in changes_by_file(run.diff).items():
        added = sum(line.startswith("+") for line in lines)
        facts[name] = f"+{added} -{len(lines) - added}" if lines else "changed"
    for line in run.diff.splitlines():
        if line.startswith(_UNTRACKED):
            facts[line.removeprefix(_UNTRACKED)] = "untracked"
    return {name: text for name, text in facts.items() if text}


def changes_by_file(diff: str) -> dict[str, list[str]]:
    """Return the lines that a diff of git adds and removes, with their ``+`` and ``-``, by file."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    in_hunk = False
    for line in diff.splitlines():
        if match := _FILE.match(line):
            lines, in_hunk = found.setdefault(match[1], []), False
        elif line.startswith("@@"):
            in_hunk = True
        elif in_hunk and line.startswith(("+", "-")):
            lines.append(line)
    return found


def own_lines(runs: Sequence[StoredRun], labels: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield file, label of the run, and line, for each uncommitted change of a line that not all of the runs have."""
    changes = [changes_by_file(run.diff) for run in runs]
    for name in dict.fromkeys(name for known in changes for name in known):
        common = set.intersection(*(set(known.get(name, ())) for known in changes))
        for label, known in zip(labels, changes, strict=True):
            yield from ((name, label, line) for line in known.get(name, ()) if line not in common and line[1:].strip())


def git_command(runs: Sequence[StoredRun]) -> str | None:
    """Return the command that shows what differs between the commits of two runs; None if there are not two."""
    commits = list(dict.fromkeys(_commit(run) for run in runs))
    return f"git diff {commits[0]} {commits[1]}" if len(commits) == 2 and all(commits) else None


def _commit(run: StoredRun) -> str:
    commit = str(run.environment.get("git.commit") or "")
    return commit if _COMMIT.fullmatch(commit) else ""
