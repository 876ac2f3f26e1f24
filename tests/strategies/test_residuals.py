"""stack and exact against dense float64 references."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.models.adapters import AdapterState, residual_names
from strategies import STRATEGIES, exact, lowrank, robust, stack
from strategies.base import Round
from tests.samples import updates_of
from tests.strategies.random_adapters import (
    D_IN,
    D_OUT,
    HEAD,
    LAYER,
    MAGNITUDE,
    A,
    B,
    normal,
    product,
    random_adapter,
)

RA, RB = residual_names(LAYER)


def _state(draw, rank, residual=0):
    plain = random_adapter(draw, rank)
    if not residual:
        return plain
    return AdapterState(
        {**plain, RA: normal(draw, residual, D_IN), RB: normal(draw, D_OUT, residual)}
    )


def _product(round, state):
    """What the layer adds to its base weight, float64."""
    dense = round.scale(len(state[A])) * product(state)
    return dense + state[RB].double() @ state[RA].double() if RA in state else dense


def _mean(round, updates):
    total = sum(weight for _, weight in updates)
    return sum(weight / total * _product(round, update.adapter) for update, weight in updates)


def _case(seed, strategy, count, rank, rslora, residual):
    draw = np.random.default_rng(seed)
    before = _state(draw, rank, residual)
    round = Round(number=1, asked=9, before=before, alpha=16.0, rslora=rslora, seed=seed)
    round = dataclasses.replace(round, sent=strategy.start(round))
    states = [_state(draw, rank) for _ in range(count)]
    return round, updates_of(states, draw.uniform(1, 100, count))


@settings(deadline=None)
@given(
    name=st.sampled_from(["stack", "exact"]),
    seed=st.integers(0, 10**6),
    count=st.integers(1, 6),
    rank=st.integers(1, 5),
    rslora=st.booleans(),
    residual=st.sampled_from([0, 1, 6]),
    bound=st.sampled_from([3, 64]),
)
def test_what_the_layer_gets_is_the_mean_of_the_products(
    name, seed, count, rank, rslora, residual, bound
):
    strategy, module = STRATEGIES[name], {"stack": stack, "exact": exact}[name]
    round, updates = _case(seed, strategy, count, rank, rslora, residual)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RESIDUAL_RANK", bound)
        new, again = (strategy.aggregate(round, each) for each in (updates, reversed(updates)))
    wanted = _mean(round, updates)
    if residual:
        wanted += round.before[RB].double() @ round.before[RA].double()
    if name == "exact":
        wanted -= round.scale(rank) * new[B].double() @ new[A].double()
    _check(new[RB].double() @ new[RA].double(), wanted, bound, len(new[RA]))
    assert round.before.updated(new).validate_against(round.before, residual=True) is None
    assert all(torch.equal(again[key], new[key]) for key in new)
    share = torch.tensor([weight for _, weight in updates]).double()
    for key in (MAGNITUDE, HEAD):
        rows = torch.stack([update.adapter[key].double() for update, _ in updates])
        mean = torch.einsum("k,k...->...", share / share.sum(), rows).float()
        torch.testing.assert_close(new[key], mean)


def _check(found, wanted, bound, rank):
    """Equal, or where the bound cuts the nearest of that rank."""
    assert rank <= min(bound, D_OUT, D_IN)
    u, s, vt = torch.linalg.svd(wanted, full_matrices=False)
    best = (u[:, :bound] * s[:bound]) @ vt[:bound]
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5 * max(float(s[0]), 1.0))


@pytest.mark.parametrize("rule", ["none", "multi-krum"])
@pytest.mark.parametrize("name", ["stack", "exact", "svd"])
def test_where_nobody_moves_nothing_changes(name, rule):
    strategy = STRATEGIES[name]
    round, updates = _case(5, strategy, 5, 4, False, 0)
    if name == "stack":
        zero = {B: torch.zeros_like(round.before[B])}
        round = dataclasses.replace(round, before=round.before.updated(zero))
    still = [(dataclasses.replace(u, adapter=round.start), weight) for u, weight in updates]
    if rule == "none":
        new = strategy.aggregate(round, still)
    else:
        new, _ = robust.aggregate(round, still, rule=rule, share=0.2, mean=strategy.aggregate)
    after, before = _product(round, round.before.updated(new)), _product(round, round.before)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * max(float(before.norm()), 1))


def test_stack_starts_from_zero_on_what_the_base_carries_with_another_a_each_round():
    before = _state(np.random.default_rng(1), 4, residual=2)
    one, two = (Round(number=n, asked=2, before=before, seed=5) for n in (1, 2))
    sent = stack.start(one)
    assert not sent[B].any() and sent[A].shape == (4, D_IN)
    assert float(sent[A].abs().max()) <= 1 / math.sqrt(D_IN)
    assert torch.equal(sent[RA], before[RA]) and torch.equal(sent[MAGNITUDE], before[MAGNITUDE])
    assert torch.equal(stack.start(one)[A], sent[A])
    assert not torch.equal(stack.start(two)[A], sent[A])


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    inner=st.integers(1, 30),
    rank=st.integers(1, 14),
    fall=st.floats(0, 3),
)
def test_the_truncated_svd_is_the_dense_one(seed, inner, rank, fall):
    """Also where factors are nearly parallel and singular values fall by up to e^-90."""
    draw = np.random.default_rng(seed)
    left = torch.from_numpy(draw.normal(size=(D_OUT, inner)) * np.exp(-fall * np.arange(inner)))
    right = torch.from_numpy(draw.normal(size=(inner, D_IN)))
    loud = torch.from_numpy(10 ** draw.uniform(-3, 3, inner))  # one factor large, the other small
    left, right = left / loud, right * loud[:, None]
    u, sv = lowrank.truncated_svd([(1.0, left, right)], rank)
    du, s, vt = torch.linalg.svd(left @ right, full_matrices=False)
    best = (du[:, :rank] * s[:rank]) @ vt[:rank]
    torch.testing.assert_close(u @ sv, best, rtol=0, atol=1e-6 * float(s[0]))
    torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]).double())
    gram = sv @ sv.T
    assert float((gram - gram.diag().diag()).abs().max()) <= 1e-9 * float(s[0]) ** 2


@pytest.mark.parametrize("name", ["a of zero", "opposite halves"])
def test_a_loud_update_whose_product_is_zero_takes_nothing_from_the_others(name):
    """Three honest updates whose singular values are 3e-4, and a B of length 1000."""
    draw, rank = np.random.default_rng(11), 8

    def orthonormal():
        return torch.linalg.qr(normal(draw, 40, rank))[0]

    honest = [(0.25, 3e-4 * orthonormal(), orthonormal().T) for _ in range(3)]
    b, a, tolerance = normal(draw, 40, rank), torch.zeros(rank, 40), 1e-9
    if name == "opposite halves":  # each half's product is rounded to 1e-16 of its length
        b, a, tolerance = (
            torch.cat([b[:, :4], -b[:, :4]], 1),
            orthonormal().T[:4].repeat(2, 1),
            1e-8,
        )
    loud = (0.25, b * 1000 / b.norm(), a)
    total = sum(c * b.double() @ a.double() for c, b, a in honest)
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    found, sv = lowrank.truncated_svd([*honest, loud], rank)
    assert float((found @ sv - best).norm()) <= tolerance * float(best.norm())
