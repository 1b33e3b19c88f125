"""Views of stored runs: what a run was and found, and what differs between two of them."""
