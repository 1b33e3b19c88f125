"""``python -m ksuit_runner``."""

from ksuit_runner.cli.dispatch import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
