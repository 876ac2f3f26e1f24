"""Where a simulation runs: `ray` in worker processes, `inline` in this one. Both run the same apps."""
