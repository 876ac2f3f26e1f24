"""Benchmarks of fedlora and its rivals; LOG.md has a line for each attempt."""
