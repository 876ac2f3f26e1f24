"""Imports what a run needs, for the process that a sweep's cells are forked from."""

import gc
import importlib

from fedlora.startup import importing, quiet_libraries

quiet_libraries()
with importing():
    for name in (
        "client.app",
        "client.dp_sgd",
        "experiments.report",
        "server.app",
        "simulation.engines.inline",
        "simulation.run",
    ):
        importlib.import_module(name)
gc.freeze()
