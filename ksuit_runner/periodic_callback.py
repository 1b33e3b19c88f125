"""The public place of two bases of callbacks, which ``ksuit_runner`` itself has too."""

from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback

__all__ = ["DatasetCallback", "PeriodicCallback"]
