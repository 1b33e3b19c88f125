"""The public place of a base of callbacks, which ``ksuit_runner`` itself has too."""

from ksuit_runner.callback_bases.metric import MetricCallback

__all__ = ["MetricCallback"]
