"""The life of a run: its assembly, the training loop with its hooks, its record, and its end."""
