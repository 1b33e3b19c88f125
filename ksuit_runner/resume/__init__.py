"""From a stored run to the config of a run that continues it."""
