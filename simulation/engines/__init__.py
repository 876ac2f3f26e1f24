"""Grids of a simulation: `ray` with worker processes, `inline` in one. Both run the same app."""
