"""What a user reads and types: the terminal, and the command lines that are printed."""
