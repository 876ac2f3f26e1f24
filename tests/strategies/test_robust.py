import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate_median
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.models.adapters import AdapterState
from strategies import fedavg, ffa, products, robust
from strategies.base import Round
from tests.samples import updates_of
from tests.strategies.random_adapters import HEAD, MAGNITUDE, A, B, random_adapter


def _state(draw, rank=2, near=None, by=1.0):
    drawn = random_adapter(draw, rank, d_out=6, d_in=7)
    if near is None:
        return drawn
    return AdapterState({name: near[name] + by * value for name, value in drawn.items()})


def _round(before, **values):
    return Round(**{"number": 1, "asked": 20, "before": before, "alpha": 8.0} | values)


def _dense(round, state):
    product = round.scale(len(state[A])) * (state[B].double() @ state[A].double())
    rest = [state[name].double().flatten() for name in (MAGNITUDE, HEAD)]
    return torch.cat([product.flatten(), *rest]).numpy()


def _factors(state):
    return torch.cat([state[name].double().flatten() for name in (A, B)]).numpy()


def _changes(round, states):
    """The changes of products with magnitudes and head, and those of factors, by rows."""
    of_products = np.stack([_dense(round, s) - _dense(round, round.before) for s in states])
    return of_products, np.stack([_factors(s) - _factors(round.before) for s in states])


@given(st.integers(0, 10**6), st.integers(2, 6), st.booleans())
@settings(deadline=None)
def test_inner_products_from_factors_are_those_of_the_dense_products(seed, count, rslora):
    draw = np.random.default_rng(seed)
    states = [_state(draw) for _ in range(count)]
    round = _round(states[0], rslora=rslora)
    dense = np.stack([_dense(round, state) for state in states])

    def tensors(name):
        return [state[name] for state in states]

    inner = products.factors(round, tensors) + products.vectors(round, tensors)
    np.testing.assert_allclose(inner, dense @ dense.T, rtol=0, atol=1e-12 * np.abs(inner).max())
    change = dense[:-1] - dense[-1]
    np.testing.assert_allclose(
        products.changes(inner),
        change @ change.T,
        rtol=0,
        atol=1e-12 * np.abs(inner).max(),
    )


@given(st.integers(0, 10**6), st.integers(1, 3))
@settings(deadline=None)
def test_krum_chooses_what_flowers_krum_chooses_among_dense_products_and_factors(seed, bad):
    draw = np.random.default_rng(seed)
    count = 2 * bad + 3 + int(draw.integers(0, 4))
    before = _state(draw)
    states = [_state(draw, near=before, by=0.1) for _ in range(count - bad)]
    states += [_state(draw, near=before, by=5.0) for _ in range(bad)]
    states = [states[i] for i in draw.permutation(count)]
    round, keep = _round(before), count - bad
    both = [change / np.sqrt(np.median((change**2).sum(1))) for change in _changes(round, states)]
    contents = [
        RecordDict({"x": ArrayRecord({"p": Array(row)})}) for row in np.concatenate(both, axis=1)
    ]
    theirs = select_multikrum(contents, bad, keep)
    expected = {i for i, content in enumerate(contents) if any(content is t for t in theirs)}
    _, out = robust.aggregate(
        round,
        reversed(updates_of(states)),
        rule="multi-krum",
        share=bad / count,
        mean=fedavg.aggregate,
    )
    assert {f"bank-{i:02}" for i in range(count)} - set(out) == {f"bank-{i:02}" for i in expected}


@given(st.integers(0, 10**6), st.integers(3, 9))
@settings(deadline=None)
def test_the_median_is_flowers_own(seed, count):
    draw = np.random.default_rng(seed)
    states = [_state(draw) for _ in range(count)]
    results = [([t.numpy() for t in state.values()], 1) for state in states]
    mine, _ = robust.aggregate(
        _round(states[0]), updates_of(states), rule="median", share=0.2, mean=fedavg.aggregate
    )
    for got, expected in zip(mine.values(), aggregate_median(results), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_nobody_counts_more_than_the_median_however_large_it_says_it_is():
    draw = np.random.default_rng(2)
    before = _state(draw)
    states = [_state(draw, near=before, by=0.1) for _ in range(5)]
    round = _round(before, weighting="records")

    def result(largest):
        updates = updates_of(states, [1000.0] * 4 + [largest])
        rule = {"rule": "multi-krum", "share": 0.1}
        return robust.aggregate(round, updates, **rule, mean=fedavg.aggregate)[0]

    assert torch.equal(result(1e7)[A], result(1000.0)[A])
    assert not torch.equal(result(1.0)[A], result(1000.0)[A])


@pytest.mark.parametrize("rule", ["median", "multi-krum"])
def test_with_a_frozen_factor_the_rules_take_what_was_sent_and_no_order_matters(rule):
    draw = np.random.default_rng(4)
    before = _state(draw)
    parts = STRATEGY_TABLE["ffa"].parts_sent(1)
    states = [_state(draw, near=before, by=0.1).only(parts) for _ in range(7)]
    round = _round(before, parts=parts)
    pairs = updates_of(states)
    both = [
        robust.aggregate(round, order, rule=rule, share=0.2, mean=ffa.aggregate)
        for order in (pairs, pairs[::-1])
    ]
    assert both[0][1] == both[1][1]
    assert A not in both[0][0]
    assert all(torch.allclose(both[0][0][name], both[1][0][name]) for name in states[0])
