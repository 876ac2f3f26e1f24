"""Aggregation: one paper, one file, one pure ``aggregate`` each; `base` holds what they share."""

from strategies import exact, fedavg, fedsa, ffa, pad, rolora, stack, svd
from strategies.base import Strategy

STRATEGIES: dict[str, Strategy] = {
    "fedavg": fedavg.STRATEGY,
    "ffa": ffa.STRATEGY,
    "rolora": rolora.STRATEGY,
    "svd": svd.STRATEGY,
    "stack": stack.STRATEGY,
    "exact": exact.STRATEGY,
    "fedsa": fedsa.STRATEGY,
    "pad": pad.STRATEGY,
}
