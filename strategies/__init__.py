"""Aggregation: one paper, one file, one pure ``aggregate`` each; `base` holds what they share."""

from strategies import fedavg, ffa, rolora, svd
from strategies.base import Strategy

STRATEGIES: dict[str, Strategy] = {
    "fedavg": fedavg.STRATEGY,
    "ffa": ffa.STRATEGY,
    "rolora": rolora.STRATEGY,
    "svd": svd.STRATEGY,
}
