"""The aggregator: a Flower ServerApp, its rounds and its run directory."""
