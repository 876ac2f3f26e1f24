"""A strategy is one file and one line: its traits in the table, its algorithm in strategies/."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.models.adapters import AdapterState, kind
from strategies import STRATEGIES, fedavg

ROOT = Path(__file__).parents[2]
ROOMS = ("fedlora", "client", "server", "strategies", "simulation")
FILE = """
from fedlora.models.adapters import AdapterState
from strategies import fedavg
from strategies.base import Strategy


def aggregate(this_round, updates):
    mean = fedavg.aggregate(this_round, updates)
    return AdapterState({name: (t + this_round.before[name]) / 2 for name, t in mean.items()})


STRATEGY = Strategy(aggregate=aggregate)
"""
LINE = '    "halfway": Traits(summary="half the step", factor_means=True, sent=(_FROZEN_A,)),\n'
RUN = """
import json, sys
from fedlora.config.config import from_flat
from simulation import run
for values in json.loads(sys.argv[1]):
    config = from_flat(values)
    with run.load("inline", config), run.open_engine("inline", config) as grid:
        run.run_rounds(config, grid)
"""
"""Runs configurations with the rooms of the working directory."""


def test_a_file_and_a_line_in_the_table_add_a_strategy_that_runs(tmp_path, tiny_config):
    copy = tmp_path / "project"
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "strategies" / "halfway.py").write_text(FILE)
    table = copy / "fedlora" / "config" / "strategy_table.py"
    head, last, rest = table.read_text().partition('    "ffa": Traits(')
    table.write_text(head + LINE + last + rest)

    values = {
        "privacy.epsilon": math.inf,
        "training.local-steps": 2,  # under a head of zeros the first one moves the head alone
        "federation.rounds": 1,
        "federation.server-optimizer": "none",
        "federation.server-learning-rate": 1.0,
    }
    configs = [
        tiny_config(**values).flat()
        | {"federation.strategy": name, "run-dir": str(tmp_path / name)}
        for name in ("ffa", "halfway")
    ]
    subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(configs)],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        check=True,
        capture_output=True,
    )
    whole, half = (AdapterState.open(tmp_path / name / "adapter") for name in ("ffa", "halfway"))
    for name, tensor in whole.items():
        if kind(name) == "B":  # which starts at zero
            assert tensor.abs().max() > 0
            assert (half[name] == tensor / 2).all()
        elif kind(name) == "A":
            assert (half[name] == tensor).all()


def test_the_traits_of_each_strategy_are_those_of_its_algorithm():
    for name, strategy in STRATEGIES.items():
        traits = STRATEGY_TABLE[name]
        assert traits.factor_means == (strategy.aggregate is fedavg.aggregate)
        if traits.linear:  # secure aggregation calls no aggregate
            assert strategy.aggregate is fedavg.aggregate
