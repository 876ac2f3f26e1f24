"""The command line, simulation engines, and everything that measures a run."""
