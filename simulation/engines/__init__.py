"""Grids of a simulation: `ray` with worker processes, `inline` in this one. Both run one app."""
