r"""FedSA-LoRA: A is shared, B stays with the institution, which ends with its own model.

A learns general features, B those of one institution. The server averages A and a head. B and
DoRA's magnitude, which both belong to a layer's outputs, are local parts: the institution trains
them, keeps them from round to round and never sends them. The server's B stays zero, so its adapter
computes the same as base and head; an institution's model needs its local parts too.

Under DP all trained parts are clipped and noised together, including the local ones, because the A
of a later round depends on them.

Reference: Guo et al. (2024), Selective Aggregation for Low-Rank Adaptation in Federated Learning
(FedSA-LoRA), arXiv 2410.01463.
"""

from strategies.base import Strategy
from strategies.fedavg import aggregate

STRATEGY = Strategy(aggregate=aggregate)
