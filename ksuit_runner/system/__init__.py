"""Files, signals, threads, processes and locks of the operating system."""
