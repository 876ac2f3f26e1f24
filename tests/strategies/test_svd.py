import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import svd
from strategies.base import Round
from tests.samples import updates_of
from tests.strategies.random_adapters import HEAD, MAGNITUDE, A, B, product, random_adapter


def _mean(round, updates):
    """The dense weighted mean of s_k B_k A_k, float64."""
    total = sum(weight for _, weight in updates)
    return sum(
        weight
        / total
        * round.scale(u.adapter[A].shape[0])
        * (u.adapter[B].double() @ u.adapter[A].double())
        for u, weight in updates
    )


def _product(round, state):
    return round.scale(state[A].shape[0]) * product(state)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 11),
    count=st.integers(1, 6),
    rslora=st.booleans(),
)
def test_the_product_is_the_truncated_dense_svd(seed, rank, count, rslora):
    draw = np.random.default_rng(seed)
    before = random_adapter(draw, rank)
    updates = updates_of(
        [random_adapter(draw, rank) for _ in range(count)], draw.uniform(1, 100, count)
    )
    round = Round(number=1, asked=9, before=before, alpha=16.0, rslora=rslora)
    new = svd.aggregate(round, updates)
    u, s, vt = torch.linalg.svd(_mean(round, updates), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    torch.testing.assert_close(_product(round, new), best, rtol=0, atol=1e-5 * float(best.norm()))
    assert new.validate_against(before) is None
    again = svd.aggregate(round, reversed(updates))
    assert all(torch.equal(again[name], new[name]) for name in new)
    share = torch.tensor([weight for _, weight in updates]).double()
    share = share / share.sum()
    for name in (MAGNITUDE, HEAD):
        stack = torch.stack([u.adapter[name].double() for u, _ in updates])
        torch.testing.assert_close(new[name], torch.einsum("k,k...->...", share, stack).float())


@pytest.mark.parametrize("moved", [False, True])
def test_when_all_send_the_same_factors_they_come_back(moved):
    draw = np.random.default_rng(3)
    before = random_adapter(draw, 4)
    sent = random_adapter(draw, 4) if moved else before
    if moved:
        sent = sent.updated({A: sent[A] * 2})  # so that it is nowhere too short beside the old one
    round = Round(number=1, asked=3, before=before, alpha=8.0)
    new = svd.aggregate(round, updates_of([sent] * 3, [1.0, 1.0, 1.0]))
    for name in before:
        torch.testing.assert_close(new[name], sent[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shortest", [1.0, 0.03])
def test_where_nobody_moved_a_it_stays(shortest):
    draw = np.random.default_rng(3)
    before = random_adapter(draw, 4)
    u, _, v = torch.linalg.svd(before[A], full_matrices=False)
    before = before.updated({A: u * torch.logspace(0, float(np.log10(shortest)), 4) @ v})
    moved = [before.updated({B: random_adapter(draw, 4)[B]}) for _ in range(3)]
    new = svd.aggregate(Round(number=1, asked=3, before=before), updates_of(moved, [1.0, 2.0, 3.0]))
    torch.testing.assert_close(new[A], before[A], rtol=0, atol=1e-6)
