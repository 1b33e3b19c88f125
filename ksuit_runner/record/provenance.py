"""The provenance of a run: command, code, packages and hardware, as they are stored with it.

Environment variables are omitted on purpose: they hold passwords and tokens.
"""

import platform
import subprocess
import sys
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil

from ksuit_runner import __version__
from ksuit_runner.system.cores import core_count
from ksuit_runner.system.gpus import gpu_names
from ksuit_runner.ui.command_line import command_line

DIFF_LIMIT = 1_000_000
"""Size that a stored diff is cut at, in bytes."""

_GIT_TIMEOUT_S = 10.0
_NAMED = ("torch", "hydra-core", "omegaconf", "mlflow", "safetensors", "numpy")


class Provenance:
    """The provenance of a run, collected on first access.

    The runs of a sweep in one process share it: collecting takes longer than a tiny run.
    """

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What ``collect`` returns."""
        return collect()

    @cached_property
    def diff(self) -> str:
        """What ``uncommitted_diff`` returns."""
        return uncommitted_diff()

    @property
    def tags(self) -> dict[str, str]:
        """What a tracker shows of it: the state of the code."""
        git = self.environment["git"]
        return {f"git.{key}": str(value) for key, value in git.items() if value is not None}


def collect() -> dict[str, Any]:
    """Describe the process, its code and its machine in plain values that fit into JSON.

    Returns:
        ``command``, ``folder`` (its name only), ``git`` (commit, branch, dirty; None each where there is no git
        repository), ``python``, ``platform``, ``versions`` (the packages that matter most), ``packages`` (all that are
        installed) and ``hardware``.
    """
    packages = installed_packages()
    versions = {name: packages.get(name) for name in _NAMED}
    return {
        "command": command_line(),
        "folder": Path.cwd().name,
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"ksuit_runner": __version__, **versions},
        "packages": packages,
        "hardware": hardware(),
    }


def git_state() -> dict[str, str | bool | None]:
    """Return commit, branch and whether anything is uncommitted, for the repository of the current folder.

    Untracked files count as uncommitted, ignored ones do not. Where there is no git, no repository or no commit yet,
    the value is None; so is the branch of a detached checkout.
    """
    status = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "branch": _git("symbolic-ref", "--quiet", "--short", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def uncommitted_diff() -> str:
    """Return the diff of the running code to the last commit, in the format of ``git apply``; 1 MB at most.

    Untracked files are only named, in comment lines at the top. Empty without a repository or changes.
    """
    untracked = _git("ls-files", "--others", "--exclude-standard", "--full-name", ":/") or ""
    names = "".join(f"# untracked: {name}\n" for name in untracked.splitlines())
    # The user's git settings must not change the format.
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
    changes = _git("diff", *plain, "HEAD") or ""
    encoded = (names + (changes and changes + "\n")).encode()
    if len(encoded) <= DIFF_LIMIT:
        return encoded.decode()
    note = f"\n# cut at {DIFF_LIMIT} bytes\n"
    return encoded[: DIFF_LIMIT - len(note)].decode(errors="ignore") + note


def installed_packages() -> dict[str, str]:
    """Return the version of every installed package by its name; the first one on the path counts."""
    found: dict[str, str] = {}
    for distribution in distributions():
        metadata = distribution.metadata  # which is read again by every access
        if name := metadata["Name"]:  # a half-removed package has none
            found.setdefault(name, metadata["Version"])
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def hardware() -> dict[str, Any]:
    """Return the processor, the cores that this process may use, the memory in bytes, and the GPUs by name."""
    gpus = _gpu_names()
    return {
        "cpu": _cpu_model(),
        "cores": core_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "gpu_count": len(gpus),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return gpu_names()  # a run on the CPU does not wait for the start of CUDA


def _git(*arguments: str) -> str | None:
    """Return what git prints, at most a little more than the limit; None if it fails, is missing or takes too long."""
    # The output goes to a file and not to memory: a diff can have any size. Without optional locks, a `git commit` that
    # the user makes at this moment does not fail.
    command = ["git", "--no-optional-locks", "--no-pager", *arguments]
    with TemporaryFile() as output:
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=_GIT_TIMEOUT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        output.seek(0)
        return output.read(DIFF_LIMIT + 1).decode(errors="replace").rstrip("\n")
