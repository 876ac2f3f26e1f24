"""Exact per-example gradients: layers, low-rank updates, packed passes, examination at load.

Imports the rooms config and data.
"""
