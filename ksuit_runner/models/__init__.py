"""Models that ship with the runner, and the wrapper that makes any module a model of a run."""
