"""Datasets, the order of their samples, and the loader that all datasets of a run share."""
