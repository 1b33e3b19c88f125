"""``python -m ksuit_runner``."""

import sys
from signal import SIGINT

from ksuit_runner.system.imports import own_process, quick_imports


def main() -> None:
    """Run what the command line asks for; on a terminal there is a first sign before anything large is imported."""
    answers_at_once = any(word.startswith("-") and word not in ("-m", "--multirun") for word in sys.argv[1:])
    if sys.stdout is not None and sys.stdout.isatty() and not answers_at_once:
        sys.stdout.write("starting\r")  # what comes next is written over it, and longer
        sys.stdout.flush()
    own_process()
    try:
        with quick_imports(before_runs=True):
            from ksuit_runner.cli.dispatch import main as run_command

        run_command()
    except KeyboardInterrupt:  # while it imports, mostly: there is nothing to tell
        sys.exit(128 + SIGINT)


__all__ = ["main"]

if __name__ == "__main__":
    main()
