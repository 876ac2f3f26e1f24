"""The command line: one entry for every room."""
