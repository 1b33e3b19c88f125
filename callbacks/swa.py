"""Stochastic weight averaging."""

from ksuit_runner.callback_bases.averaging import AveragingCallback


class Swa(AveragingCallback):
    """Maintains the mean of the weights at intervals from a start on, and offers it for evaluation under its name.

    It is meant for the last part of training, with a constant or cyclical learning rate. BatchNorm needs statistics
    for the mean: ``callbacks=[swa,batchnorm_statistics]`` computes them from the training data.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018,
    https://arxiv.org/abs/1803.05407.

    Args:
        **kwargs: Passed on to AveragingCallback: what is averaged, from when on, and how often. The weights at the
            start are the first ones of the mean.
    """

    def _share(self, label: str) -> float:
        return 1 / (1 + self.updates)
