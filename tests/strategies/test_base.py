import collections
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapters import AdapterState
from fedlora.errors import Refusal
from fedlora.wire import ClientUpdate
from strategies import base, fedavg

A = "base_model.model.layer.q.lora_A.weight"


def _update(name="bank", value=1.0, size=0.0, round=1, shape=(2, 3)):
    return ClientUpdate(
        institution=name,
        round=round,
        size=size,
        adapter=AdapterState({A: torch.full(shape, value)}),
    )


def _validate(update):
    reference = AdapterState({A: torch.zeros(2, 3)})
    base.validate(update, institution="bank", round=1, reference=reference)


def test_a_right_update_passes():
    _validate(_update())


@pytest.mark.parametrize(
    ("update", "code"),
    [
        (_update(value=math.nan), "invalid-update"),
        (_update(value=math.inf), "invalid-update"),
        (_update(shape=(1, 3)), "invalid-update"),  # would broadcast silently
        (_update(name="other"), "wrong-institution"),
        (_update(round=2), "stale-update"),
        (_update(size=-1.0), "invalid-size"),
        (_update(size=math.nan), "invalid-size"),
    ],
)
def test_a_wrong_update_is_refused_with_its_reason(update, code):
    with pytest.raises(Refusal) as caught:
        _validate(update)
    assert caught.value.code == code


def test_other_keys_and_dtypes_are_refused():
    extra = AdapterState({A: torch.zeros(2, 3), "more": torch.zeros(1)})
    double = AdapterState({A: torch.zeros(2, 3, dtype=torch.float64)})
    for state in (extra, double, AdapterState({})):
        with pytest.raises(Refusal, match="invalid-update"):
            _validate(ClientUpdate(institution="bank", round=1, adapter=state))


def test_weights_sum_to_one_and_follow_sizes():
    updates = [_update("a", size=100.0), _update("b", size=300.0)]
    assert base.weights(updates, "uniform") == [0.5, 0.5]
    assert base.weights(updates, "public-size") == [0.25, 0.75]
    with pytest.raises(Refusal, match="no update carries a size"):
        base.weights([_update()], "public-size")


def test_fedavg_is_the_weighted_mean_by_hand():
    updates = [_update("a", 1.0), _update("b", 5.0)]
    mean = fedavg.aggregate(updates, [0.75, 0.25])
    assert torch.equal(mean[A], torch.full((2, 3), 2.0))
    assert torch.equal(updates[0].adapter[A], torch.ones(2, 3))


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, 40))
    ),
    st.integers(0, 3),
)
def test_nobody_is_asked_more_often_than_the_cap_and_every_round_is_full(sizes, seed):
    institutions, per_round, rounds = sizes
    cap = base.participations(rounds, institutions, per_round)
    asked = collections.Counter({f"bank-{i}": 0 for i in range(institutions)})
    for number in range(1, rounds + 1):
        chosen = base.sample(asked, per_round=per_round, cap=cap, seed=seed, round=number)
        assert len(chosen) == len(set(chosen)) == (per_round or institutions)
        assert chosen == sorted(chosen)
        asked.update(chosen)
    assert max(asked.values()) <= cap


def test_the_lot_depends_on_seed_and_round_only():
    asked = {f"bank-{i}": 0 for i in range(20)}
    backwards = dict(reversed(asked.items()))
    draw = {"per_round": 5, "cap": 9}
    first = base.sample(asked, **draw, seed=1, round=1)
    assert first == base.sample(backwards, **draw, seed=1, round=1)
    assert first != base.sample(asked, **draw, seed=1, round=2) or first != base.sample(
        asked, **draw, seed=2, round=1
    )
