"""Imports what a run needs, for the process that a sweep's cells are forked from."""

import gc
import importlib

from fedlora.startup import importing
from simulation import run as simulate

simulate.quiet_libraries()
with importing():
    for name in ("cli", "engines.inline", "report"):
        importlib.import_module(f"experiments.{name}")
    for name in ("client.app", "client.dp_sgd", "server.app"):
        importlib.import_module(name)
gc.freeze()
