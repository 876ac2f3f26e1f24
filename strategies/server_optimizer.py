r"""Optimizers on the aggregated update :math:`\Delta_t = \bar w_t - w_t`.

The optimizers treat the update as a descent direction. Under DP they see noised updates only, so
they are post-processing. Averaging comes before the adaptive step, so the noise first shrinks by
the square root of the cohort.

Reference: Reddi et al. (2021), Adaptive Federated Optimization, arXiv 2003.00295.
"""

from collections.abc import Mapping

import torch

from fedlora.models.adapters import AdapterState, kind

BETA1, BETA2, TAU = 0.9, 0.99, 1e-8

Moments = Mapping[str, torch.Tensor]
"""Optimizer state of each tensor NAME: ``m/NAME``, ``v/NAME`` float32 of its shape, and its number
of steps ``t/NAME``, int64 ()."""


def step(
    method: str,
    learning_rate: float,
    before: AdapterState,
    aggregated: AdapterState,
    state: Moments,
    *,
    head_learning_rate: float = 0.0,
) -> tuple[AdapterState, dict[str, torch.Tensor]]:
    r"""One server step from ``before`` towards ``aggregated``.

    Moments are corrected for their start at zero as in Adam (Kingma & Ba), since runs here have
    tens of rounds. Those of yogi are not, as in Reddi et al.: its v is no exponential mean, so that
    Adam's divisor does not undo the start.

    Args:
        method: ``none`` (:math:`w + \eta \Delta`), ``momentum``, ``adam``, ``yogi`` or ``adagrad``.
        learning_rate: :math:`\eta`.
        before: The global adapter.
        aggregated: The strategy's result. Other tensors and their state stay as they are: a factor
            that is trained every other round takes every other step.
        state: The state after the last step; empty at first.
        head_learning_rate: :math:`\eta` of a classification head, with adam, yogi and adagrad;
            0: ``learning_rate``. A head of zeros has to reach the scale of its classes.
            A starts at a scale of its own, which the noise in steps of a large rate would drown.

    Returns:
        The new global adapter and the new state. The inputs are not modified.
    """
    if method == "none":
        if learning_rate == 1:  # residuals have another shape than before
            return before.updated(aggregated), dict(state)
        moved = {n: before[n] + learning_rate * (t - before[n]) for n, t in aggregated.items()}
        return before.updated(moved), dict(state)
    new: dict[str, torch.Tensor] = {}
    moments = dict(state)
    for name, target in aggregated.items():
        old = before[name]
        delta = target - old
        t = int(state.get(f"t/{name}", torch.zeros((), dtype=torch.int64))) + 1
        moments[f"t/{name}"] = torch.tensor(t, dtype=torch.int64)
        m = BETA1 * state.get(f"m/{name}", torch.zeros_like(old)) + (1 - BETA1) * delta
        moments[f"m/{name}"] = m
        weight = 1 - BETA1**t  # of all that m has seen
        if method == "momentum":
            new[name] = old + learning_rate * m / weight
            continue
        v = state.get(f"v/{name}", torch.zeros_like(old))
        square = delta * delta
        if method == "adam":
            v = BETA2 * v + (1 - BETA2) * square
            scale = v / (1 - BETA2**t)
        elif method == "yogi":
            v = v - (1 - BETA2) * square * torch.sign(v - square)
            scale, weight = v, 1.0
        else:
            v = v + square
            scale = v
        moments[f"v/{name}"] = v
        of_head = kind(name) == "head" and head_learning_rate > 0
        rate = head_learning_rate if of_head else learning_rate
        new[name] = old + rate * (m / weight) / (scale.sqrt() + TAU)
    return before.updated(new), moments
