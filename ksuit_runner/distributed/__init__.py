"""Training by several processes, the ranks of a run: who they are, what they exchange, and how they share an update."""
