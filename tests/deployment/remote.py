"""Institutions with settings of their own, in this process: no network lies between."""

import client.app
from simulation.engines.inline import InlineGrid

BANKS = ("Alpha", "Beta", "Delta", "Gamma")  # as the simulation sorts them
LABELS = '["card", "fraud", "loan"]'


class Remote(InlineGrid):
    """Institutions on machines of their own: each app gets its settings and nothing else."""

    def __init__(self, files, run_config):
        super().__init__(client.app.app, len(files), run_config)
        for context, file in zip(self._contexts.values(), files, strict=True):
            context.node_config.clear()
            context.node_config["settings"] = str(file)
