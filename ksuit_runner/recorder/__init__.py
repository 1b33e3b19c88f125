"""The recorder: the process that records a run, beside the one that trains it."""
