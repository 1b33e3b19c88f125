"""Sweeps: many runs from one YAML file or one command line, planned before the first one starts."""
