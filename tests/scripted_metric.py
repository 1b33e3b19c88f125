"""A callback that logs given values, for tests of callbacks that watch a metric."""

from ksuit_runner.callback_bases.periodic import PeriodicCallback


class ScriptedMetric(PeriodicCallback):
    """Logs the next of the given values at every second update."""

    def __init__(self, key, values, **kwargs):
        super().__init__(every_n_updates=2, **kwargs)
        self.key = key
        self.values = values

    def _periodic_callback(self, update_counter):
        self.writer.add_scalar(self.key, self.values[update_counter.update // 2 - 1])
