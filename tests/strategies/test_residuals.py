"""stack, exact and pad against dense float64 references, with the scales of mixed ranks."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.models.adapters import AdapterState, residual_names
from strategies import STRATEGIES, diagnostics, exact, lowrank, pad, robust, stack
from strategies.base import Round
from strategies.diagnostics import Watch
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


def _case(seed, strategy, ranks, rslora, residual, bound):
    draw = np.random.default_rng(seed)
    rank = max(ranks)
    round = Round(
        number=1,
        asked=9,
        before=_state(draw, rank, residual),
        alpha=16.0,
        rslora=rslora,
        residual_rank=bound,
        seed=seed,
    )
    starts = {r: strategy.start(round, r) for r in ranks}
    sent = {f"bank-{i:02}": starts[r] for i, r in enumerate(ranks)}
    round = dataclasses.replace(round, sent=sent)
    states = [_state(draw, r) for r in ranks]
    return round, updates_of(states, draw.uniform(1, 100, len(states)))


CASES = {
    "seed": st.integers(0, 10**6),
    "ranks": st.lists(st.integers(1, 5), min_size=1, max_size=6),
    "rslora": st.booleans(),
    "residual": st.sampled_from([0, 1, 6]),
    "bound": st.sampled_from([3, 64]),
}


@settings(deadline=None)
@given(**CASES)
def test_what_stack_adds_to_the_layer_is_the_mean_of_the_products(
    seed, ranks, rslora, residual, bound
):
    round, updates = _case(seed, stack.STRATEGY, ranks, rslora, residual, bound)
    new = stack.aggregate(round, updates)
    assert set(new) == {RA, RB, MAGNITUDE, HEAD}
    old = round.before[RB].double() @ round.before[RA].double() if residual else 0.0
    _check(new[RB].double() @ new[RA].double(), old + _mean(round, updates), bound, len(new[RA]))
    _check_order_and_vectors(stack.aggregate, round, updates, new)


@settings(deadline=None)
@given(**CASES)
def test_what_exact_leaves_in_the_layer_is_the_mean_of_the_products(
    seed, ranks, rslora, residual, bound
):
    ranks = [ranks[0]] * len(ranks)
    round, updates = _case(seed, exact.STRATEGY, ranks, rslora, residual, bound)
    new = exact.aggregate(round, updates)
    old = round.before[RB].double() @ round.before[RA].double() if residual else 0.0
    factors = round.scale(ranks[0]) * new[B].double() @ new[A].double()
    rest = old + _mean(round, updates) - factors
    _check(new[RB].double() @ new[RA].double(), rest, bound, len(new[RA]))
    assert round.before.updated(new).validate_against(round.before, residual=True) is None
    _check_order_and_vectors(exact.aggregate, round, updates, new)


def _check(found, wanted, bound, rank):
    """Equal, or where the bound cuts the nearest of that rank."""
    assert rank <= min(bound, D_OUT, D_IN)
    u, s, vt = torch.linalg.svd(wanted, full_matrices=False)
    best = (u[:, :bound] * s[:bound]) @ vt[:bound]
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5 * max(float(s[0]), 1.0))


def _check_order_and_vectors(aggregate, round, updates, new):
    again = aggregate(round, reversed(updates))
    assert all(torch.equal(again[name], new[name]) for name in new)
    share = torch.tensor([weight for _, weight in updates]).double()
    for name in (MAGNITUDE, HEAD):
        rows = torch.stack([update.adapter[name].double() for update, _ in updates])
        mean = torch.einsum("k,k...->...", share / share.sum(), rows).float()
        torch.testing.assert_close(new[name], mean)


@settings(deadline=None)
@given(seed=CASES["seed"], ranks=CASES["ranks"], rslora=st.booleans())
def test_pad_averages_the_padded_changes(seed, ranks, rslora):
    round, updates = _case(seed, pad.STRATEGY, ranks, rslora, 0, 64)
    before, rank = round.before, max(ranks)
    total = sum(weight for _, weight in updates)
    mean = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in before.items()}
    for update, weight in updates:
        own, r = update.adapter, len(update.adapter[A])
        ratio = round.scale(rank) / round.scale(r)
        a, b = before[A].double().clone(), before[B].double().clone()
        a[:r] = own[A].double()
        b[:, :r] += ratio * (own[B].double() - ratio * b[:, :r])
        for name, value in {**own, A: a, B: b}.items():
            mean[name] += weight / total * value.double()
    new = pad.aggregate(round, updates)
    for name in before:
        torch.testing.assert_close(new[name], mean[name].float(), rtol=1e-5, atol=1e-5)
    backwards = pad.aggregate(round, reversed(updates))
    assert all(torch.equal(backwards[name], new[name]) for name in new)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_pad_takes_the_step_of_an_institution_whose_scale_is_the_global_one(optimizer, rslora):
    """Of SGD the whole step; of Adam, whose steps do not see the scale, that part of B's."""
    draw = np.random.default_rng(4)
    before, towards = _state(draw, 4), normal(draw, D_OUT, D_IN)
    round = Round(number=1, asked=1, before=before, alpha=8.0, rslora=rslora)
    sent = pad.start(round, 2)

    def stepped(state, scale):
        """A and B after a step down the distance of s B A to a matrix."""
        a, b = (state[name].double().requires_grad_() for name in (A, B))
        (scale * b @ a - towards).square().sum().backward()
        optimizer([a, b], lr=1e-3).step()
        return a.detach(), b.detach()

    own_a, own_b = stepped(sent, round.scale(2))
    answer = sent.updated({A: own_a.float(), B: own_b.float()})
    new = pad.aggregate(round, updates_of([answer], [1.0]))
    wanted_a, wanted_b = stepped(before.cut(2), round.scale(4))
    part = round.scale(4) / round.scale(2) if optimizer is torch.optim.Adam else 1.0
    first = before[B][:, :2].double()
    torch.testing.assert_close(new[A][:2], wanted_a.float())
    torch.testing.assert_close(new[B][:, :2], (first + part * (wanted_b - first)).float())
    assert not torch.allclose(new[B][:, :2], before[B][:, :2])


def test_pad_leaves_a_row_alone_that_nobody_who_answered_holds():
    draw = np.random.default_rng(3)
    before = _state(draw, 4)
    round = Round(number=1, asked=2, before=before, alpha=8.0)
    sent = pad.start(round, 2)
    torch.testing.assert_close(
        _product(round, sent), round.scale(4) * (before[B][:, :2] @ before[A][:2]).double()
    )
    same = pad.aggregate(round, updates_of([sent, sent], [1.0, 3.0]))
    for name in before:
        torch.testing.assert_close(same[name], before[name])


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_svd_sends_the_nearest_product_of_a_lower_rank(rank):
    draw = np.random.default_rng(1)
    before = _state(draw, 4)
    round = Round(number=1, asked=2, before=before, alpha=8.0)
    sent = STRATEGIES["svd"].start(round, rank)
    assert sent.validate_against(before.cut(rank)) is None
    u, s, vt = torch.linalg.svd(_product(round, before), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    torch.testing.assert_close(_product(round, sent), best, rtol=0, atol=1e-5 * float(s[0]))


def _nobody_moved(name, ranks, rslora=False):
    """A round in which everybody sends what it was sent."""
    strategy = STRATEGIES[name]
    round, updates = _case(5, strategy, ranks, rslora, 0, 64)
    if name == "stack":
        round = dataclasses.replace(
            round, before=round.before.updated({B: torch.zeros_like(round.before[B])})
        )
    still = [
        (dataclasses.replace(u, adapter=round.sent_to(u.institution)), weight)
        for u, weight in updates
    ]
    return round, still


@pytest.mark.parametrize("rule", ["none", "krum", "norm-bound"])
@pytest.mark.parametrize("name", [name for name, t in STRATEGY_TABLE.items() if t.mixed_ranks])
def test_where_nobody_moves_nothing_changes_whatever_the_ranks(name, rule):
    round, still = _nobody_moved(name, [1, 4, 2, 4, 1])
    watch, aggregate = Watch(round), STRATEGIES[name].aggregate
    if rule == "none":
        new = aggregate(round, watch.through(still))
    else:
        new, _ = robust.aggregate(
            round, watch.through(still), rule=rule, byzantine=0, mean=aggregate
        )
    after, before = _product(round, round.before.updated(new)), _product(round, round.before)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * max(float(before.norm()), 1))
    figures = watch.figures(new)
    assert figures["error"] < 1e-5
    size = max(float(before.norm()), 1.0)
    assert all(norm < 1e-5 * size + 1e-5 for norm in figures["norm"].values())


@settings(deadline=None)
@given(seed=CASES["seed"], ranks=CASES["ranks"], rslora=st.booleans())
def test_svd_takes_the_mean_change_of_what_each_was_sent(seed, ranks, rslora):
    strategy = STRATEGIES["svd"]
    round, updates = _case(seed, strategy, ranks, rslora, 0, 64)
    total = sum(weight for _, weight in updates)
    wanted = _product(round, round.before) + sum(
        weight
        / total
        * (_product(round, u.adapter) - _product(round, round.sent_to(u.institution)))
        for u, weight in updates
    )
    watch = Watch(round)
    new = strategy.aggregate(round, watch.through(updates))
    u, s, vt = torch.linalg.svd(wanted, full_matrices=False)
    rank = max(ranks)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    torch.testing.assert_close(_product(round, new), best, rtol=0, atol=1e-4 * float(s[0]))
    lost = float((best - wanted).norm() / _mean(round, updates).norm())
    assert watch.figures(new)["error"] == pytest.approx(lost, rel=1e-2, abs=1e-5)


def test_norm_bound_at_mixed_ranks_keeps_one_who_shouts_to_the_median():
    round, still = _nobody_moved("pad", [1, 4, 2, 4, 1])
    loud = [
        (dataclasses.replace(u, adapter=_moved(u.adapter, 1000.0 if i == 2 else 1.0)), 1.0)
        for i, (u, _) in enumerate(still)
    ]
    new, _ = robust.aggregate(
        round, loud, rule="norm-bound", byzantine=1, mean=STRATEGIES["pad"].aggregate
    )
    plain = STRATEGIES["pad"].aggregate(round, loud)
    change, unbounded = (
        float((_product(round, state) - _product(round, round.before)).norm())
        for state in (new, plain)
    )
    watch = Watch(round)
    list(watch.through(loud))
    median = sorted(watch.figures(new)["norm"].values())[2]
    assert change <= 1.5 * median < unbounded


def _moved(state, by):
    return AdapterState({n: t + by * 0.01 if n == B else t for n, t in state.items()})


def test_stack_starts_from_zero_on_what_the_base_carries_with_another_a_each_round():
    before = _state(np.random.default_rng(1), 4, residual=2)
    one, two = (Round(number=n, asked=2, before=before, seed=5) for n in (1, 2))
    sent = stack.start(one, 3)
    assert not sent[B].any() and sent[A].shape == (3, D_IN)
    assert float(sent[A].abs().max()) <= 1 / math.sqrt(D_IN)
    assert torch.equal(sent[RA], before[RA]) and torch.equal(sent[MAGNITUDE], before[MAGNITUDE])
    assert torch.equal(stack.start(one, 3)[A], sent[A])
    assert not torch.equal(stack.start(two, 3)[A], sent[A])


@pytest.mark.parametrize("name", ["stack", "exact", "pad", "fedsa"])
def test_of_nothing_comes_nothing(name):
    round = Round(number=1, asked=3, before=_state(np.random.default_rng(0), 2))
    assert len(STRATEGIES[name].aggregate(round, [])) == 0


@pytest.mark.parametrize(("name", "bound"), [("stack", 64), ("exact", 64), ("stack", 2)])
def test_the_error_counts_what_the_residual_changed(name, bound, monkeypatch):
    round, updates = _case(7, STRATEGIES[name], [3, 3, 3], False, 6, bound)
    if name == "stack":  # the global factors are never trained: their product stays zero
        before = round.before.updated({B: torch.zeros_like(round.before[B])})
        round = dataclasses.replace(round, before=before)
    before = round.before
    old = before[RB].double() @ before[RA].double()
    whole = Watch(round)
    monkeypatch.setattr(diagnostics, "MAX_EXACT_BYTES", 0)
    watches = [whole, Watch(round)]
    new = STRATEGIES[name].aggregate(round, watches[1].through(watches[0].through(updates)))
    change = _product(round, before.updated(new)) - old
    mean = _mean(round, updates)
    true = float((change - mean).norm() / mean.norm())
    assert (true < 1e-6) == (bound == 64)
    exactly, estimate = (watch.figures(new) for watch in watches)
    assert exactly["error"] == pytest.approx(true, rel=1e-4, abs=3e-7)
    assert exactly["residual_rank"] == min(bound, D_IN)
    for i, (update, _) in enumerate(updates):
        sent = round.sent_to(update.institution)
        dense = _product(round, sent.updated(update.adapter)) - _product(round, sent)
        rest = torch.cat([(update.adapter[n] - sent[n]).flatten() for n in (MAGNITUDE, HEAD)])
        norm = math.hypot(float(dense.norm()), float(rest.norm()))
        assert exactly["norm"][f"bank-{i:02}"] == pytest.approx(norm, rel=1e-5)
    # Fixed directions; one layer, so one deviation of either norm is 18 %; three are allowed.
    assert estimate["error"] == pytest.approx(true, rel=0.75, abs=1e-5)


def test_where_b_is_kept_there_is_no_error_and_a_counts_as_a_vector():
    draw = np.random.default_rng(2)
    before = _state(draw, 2)
    strategy, traits = STRATEGIES["fedsa"], STRATEGY_TABLE["fedsa"]
    parts = traits.parts_sent(1)
    round = Round(number=1, asked=2, before=before, parts=parts, local_parts=traits.local_parts)
    states = [_state(draw, 2).only(parts) for _ in range(2)]
    watch = Watch(round)
    new = strategy.aggregate(round, watch.through(updates_of(states, [1.0, 1.0])))
    figures = watch.figures(new)
    assert figures["error"] is None
    for i, state in enumerate(states):
        change = torch.cat([(state[n].double() - before[n]).flatten() for n in (A, HEAD)])
        assert figures["norm"][f"bank-{i:02}"] == pytest.approx(float(change.norm()), rel=1e-6)


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


def test_the_truncated_svd_of_zeros_has_rank_zero():
    found, sv = lowrank.truncated_svd([(1.0, torch.zeros(D_OUT, 2), torch.zeros(2, D_IN))], 2)
    assert found.shape == (D_OUT, 0) and sv.shape == (0, D_IN)
