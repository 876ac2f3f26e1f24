"""Experiments: sweeps, audits, reports and comparisons of runs."""
