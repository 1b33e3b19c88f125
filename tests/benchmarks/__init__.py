"""What `make bench` runs: the runner beside loops written by hand and beside other trainers, on the same work."""
