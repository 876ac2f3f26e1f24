"""The imports of a run, preloaded by the fork server of a sweep's cells."""

import gc
import importlib

from fedlora.runs.run_files import revision
from fedlora.startup import paused_gc, quiet_libraries

quiet_libraries()
with paused_gc():
    for name in (
        "client.app",
        "client.dp_sgd",
        "experiments.report",
        "server.app",
        "simulation.engines.inline",
        "simulation.run",
    ):
        importlib.import_module(name)
revision()
gc.freeze()
