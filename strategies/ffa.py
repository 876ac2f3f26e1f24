r"""FFA-LoRA: A is frozen at its shared random start, only B is trained and averaged.

With one A for all, averaging is exact: :math:`\sum_k p_k s B_k A = s (\sum_k p_k B_k) A`. Half the
bytes travel, and under DP the update is linear in the noise: there is no product of two noisy
factors. DoRA's magnitude and a head are trained and averaged with B.

Reference: Sun et al. (2024), Improving LoRA in Privacy-preserving Federated Learning,
arXiv 2403.12313.
"""

from strategies.base import Strategy
from strategies.fedavg import aggregate

STRATEGY = Strategy(aggregate=aggregate)
