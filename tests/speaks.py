"""A callback for the tests of those that watch a metric."""

from ksuit_runner.periodic_callback import PeriodicCallback


class Speaks(PeriodicCallback):
    """Logs one value after the other, at every second update."""

    def __init__(self, key, values, **kwargs):
        super().__init__(every_n_updates=2, **kwargs)
        self.key = key
        self.values = values

    def _periodic_callback(self, update_counter):
        self.writer.add_scalar(self.key, self.values[update_counter.update // 2 - 1])
