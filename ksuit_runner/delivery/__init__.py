"""Delivery of what a run records to its tracker: behind training, and after outages."""
