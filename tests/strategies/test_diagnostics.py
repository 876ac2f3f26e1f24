import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.models.adapters import AdapterState
from strategies import diagnostics, fedavg, ffa, svd
from strategies.base import Round
from strategies.diagnostics import Watch
from tests.samples import updates_of

HEAD = "base.score.weight"
NAMES = [f"base.{i}.q.lora_{{}}.weight" for i in range(8)]


def _state(draw, rank=2, d_in=7, d_out=6, layers=2):
    tensors = {HEAD: draw.normal(size=(3, d_in))}
    for name in NAMES[:layers]:
        tensors[name.format("A")] = draw.normal(size=(rank, d_in))
        tensors[name.format("B")] = draw.normal(size=(d_out, rank))
    return AdapterState({name: torch.from_numpy(v).float() for name, v in tensors.items()})


def _dense(round, state, head=True):
    pairs = [(state.get(n.format("A")), state.get(n.format("B"))) for n in NAMES]
    parts = [round.scale(len(a)) * (b.double() @ a.double()) for a, b in pairs if a is not None]
    parts += [state[HEAD].double()] * head
    return torch.cat([p.flatten() for p in parts]).numpy()


def _figures(round, pairs, aggregate):
    watch = Watch(round)
    result = aggregate(round, watch.through(pairs))
    return watch.figures(result), result


@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([fedavg, svd]))
@settings(deadline=None)
def test_the_figures_are_those_of_the_dense_products(seed, count, strategy):
    draw = np.random.default_rng(seed)
    before = _state(draw)
    states = [_state(draw) for _ in range(count)]
    weights = draw.uniform(1, 9, count)
    round = Round(number=1, asked=9, before=before, alpha=8.0)
    pairs = updates_of(states, weights)
    figures, result = _figures(round, pairs, strategy.aggregate)
    backwards, _ = _figures(round, pairs[::-1], strategy.aggregate)
    assert figures == backwards and figures["exact"]
    mean = np.average([_dense(round, s, head=False) for s in states], axis=0, weights=weights)
    error = np.linalg.norm(_dense(round, result, head=False) - mean) / np.linalg.norm(mean)
    assert figures["error"] == pytest.approx(error, rel=1e-4, abs=3e-7)
    changes = np.stack([_dense(round, s) - _dense(round, before) for s in states])
    along = np.average(changes, axis=0, weights=weights)
    for i, change in enumerate(changes):
        length = np.linalg.norm(change)
        assert figures["norm"][f"bank-{i:02}"] == pytest.approx(length, rel=1e-6)
        cosine = change @ along / length / np.linalg.norm(along)
        assert figures["cosine"][f"bank-{i:02}"] == pytest.approx(cosine, abs=1e-6)


def test_with_one_a_for_all_averaging_is_exact_and_apart_it_is_not():
    draw = np.random.default_rng(2)
    before = _state(draw)
    states = [_state(draw) for _ in range(3)]
    parts = STRATEGY_TABLE["ffa"].parts_sent(1)
    round = Round(number=1, asked=3, before=before, parts=parts)
    frozen = updates_of([s.only(parts) for s in states], [1.0, 2.0, 3.0])
    assert _figures(round, frozen, ffa.aggregate)[0]["error"] < 1e-6
    whole = Round(number=1, asked=3, before=before)
    assert _figures(whole, updates_of(states, [1.0, 2.0, 3.0]), fedavg.aggregate)[0]["error"] > 0.1


def test_who_did_not_move_has_no_length_and_no_direction():
    before = _state(np.random.default_rng(0))
    round = Round(number=1, asked=2, before=before)
    figures, _ = _figures(round, updates_of([before, before], [1.0, 1.0]), fedavg.aggregate)
    assert all(norm < 1e-6 for norm in figures["norm"].values())
    assert figures["error"] < 1e-6


def test_where_updates_are_not_held_the_figures_are_estimates(monkeypatch):
    """Eight layers: one deviation of a norm is 6.4 %; six of them are allowed.

    The draws are fixed, so the test is not a matter of luck; with fresh ones a false alarm of one
    figure would have a probability of 2e-9.
    """
    draw = np.random.default_rng(1)
    size = {"d_in": 200, "d_out": 150, "layers": 8}
    before = _state(draw, **size)
    states = [_state(draw, **size) for _ in range(4)]
    round = Round(number=1, asked=4, before=before, alpha=8.0)
    pairs = updates_of(states, [1.0, 2.0, 3.0, 4.0])
    exact, _ = _figures(round, pairs, fedavg.aggregate)
    monkeypatch.setattr(diagnostics, "MAX_EXACT_BYTES", 0)
    estimate, _ = _figures(round, pairs, fedavg.aggregate)
    assert exact["exact"] and not estimate["exact"]
    allowed = 6 * 0.18 / math.sqrt(8)
    for name, norm in exact["norm"].items():
        assert estimate["norm"][name] == pytest.approx(norm, rel=allowed)
        assert estimate["norm"][name] != norm
        assert estimate["cosine"][name] == pytest.approx(exact["cosine"][name], abs=allowed)
    assert estimate["error"] == pytest.approx(exact["error"], rel=2 * allowed)
    alone = _figures(round, pairs[:1], fedavg.aggregate)[0]
    assert alone["error"] < 1e-6  # what is zero stays zero


def test_many_updates_are_not_compared_row_by_row():
    before = _state(np.random.default_rng(0))
    few, many = (Round(number=1, asked=n, before=before) for n in (512, 513))
    assert Watch(few).exact and not Watch(many).exact  # rank 2
