"""The life of a run: put together, trained in the loop with its hooks, and closed."""
