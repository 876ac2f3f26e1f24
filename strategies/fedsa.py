r"""FedSA-LoRA: A is shared, B stays with the institution: each ends with a model of its own.

A learns what is general, B what is particular. The server averages A and a head; B and DoRA's
magnitude, which like B belong to a layer's outputs, are trained beside them, kept at the
institution from round to round and never sent. The server's B stays zero: what it holds computes
what the base and the head compute, and only together with an institution's own part is it the model
of that institution.

Under DP all parts that are trained are clipped together and noised, those that stay too: the A of a
later round depends on them.

Reference: Guo et al. (2024), Selective Aggregation for Low-Rank Adaptation in Federated Learning
(FedSA-LoRA), arXiv 2410.01463.
"""

from strategies.base import Strategy
from strategies.fedavg import aggregate

STRATEGY = Strategy(aggregate=aggregate)
