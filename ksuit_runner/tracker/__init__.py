"""Trackers: where runs, their metrics and their files are recorded."""
