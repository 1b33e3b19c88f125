"""Where the jobs of a sweep run: in this process, in others on this machine, on a cluster."""
