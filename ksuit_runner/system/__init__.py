"""Files, signals, threads and locks of the operating system."""
