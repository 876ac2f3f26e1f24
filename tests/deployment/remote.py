"""Institutions with settings of their own, in this process: no network lies between."""

import csv

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


def write_table(path, table):
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
