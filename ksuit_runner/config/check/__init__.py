"""Checks a config before anything heavy is imported: signatures are read from source, nothing is executed."""
