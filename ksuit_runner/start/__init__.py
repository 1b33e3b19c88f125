"""Starts a run: in this process, or in several ranks, which it supervises and starts again after one is lost."""
