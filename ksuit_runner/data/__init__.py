"""The data of a run: datasets, the order of their samples, and the loader that all of them share."""
