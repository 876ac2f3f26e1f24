r"""RoLoRA: B and A are trained and averaged in alternate rounds.

In each round one factor is the same for all, so averaging is exact as in FFA-LoRA, yet both factors
are learned. B goes first: as long as it is zero, A has no gradient. DoRA's magnitude and a head are
trained in every round.

Reference: Chen et al. (2024), Robust Federated Finetuning of LLMs via Alternating Optimization of
LoRA, arXiv 2409.02346.
"""

from strategies.base import Strategy
from strategies.fedavg import aggregate

STRATEGY = Strategy(aggregate=aggregate)
