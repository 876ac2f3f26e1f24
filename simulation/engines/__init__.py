"""Where a simulation runs: `ray` in worker processes, `inline` in this one. Same apps in both."""
