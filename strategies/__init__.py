"""Aggregation: one paper, one file, one pure ``aggregate`` each; `base` holds the shared parts.

A strategy is the file ``strategies/NAME.py`` and its line in `fedlora.config.strategy_table`.
"""

import importlib

from fedlora.config.strategy_table import STRATEGY_TABLE
from strategies.base import Strategy

STRATEGIES: dict[str, Strategy] = {
    name: importlib.import_module(f"strategies.{name}").STRATEGY for name in STRATEGY_TABLE
}
