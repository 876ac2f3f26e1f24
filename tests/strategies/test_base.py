import collections
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config.sections import FederationConfig
from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
from fedlora.wire.messages import ClientUpdate
from strategies import base
from strategies.base import Round

A = "base_model.model.layer.q.lora_A.weight"
B = "base_model.model.layer.q.lora_B.weight"
BEFORE = AdapterState({A: torch.zeros(2, 3), B: torch.zeros(3, 2)})


def _update(name="bank", value=1.0, size=0.0, round=1, run="", shape=(2, 3)):
    return ClientUpdate(
        institution=name,
        round=round,
        run=run,
        size=size,
        adapter=AdapterState({A: torch.full(shape, value)}),
    )


def _validate(update, **values):
    round = Round(**{"number": 1, "asked": 4, "before": BEFORE, "parts": ("A",)} | values)
    base.check_header(update, institution="bank", this_round=round)
    base.validate(update, institution="bank", this_round=round)


def test_a_right_update_passes():
    _validate(_update())
    _validate(_update(value=1000.0))


@pytest.mark.parametrize(
    ("update", "code"),
    [
        (_update(value=math.nan), "invalid-update"),
        (_update(value=math.inf), "invalid-update"),
        (_update(shape=(1, 3)), "invalid-update"),  # would broadcast silently
        (_update(name="other"), "wrong-institution"),
        (_update(round=2), "stale-update"),
        (_update(run="another"), "other-run"),
        (_update(size=-1.0), "invalid-size"),
        (_update(size=math.nan), "invalid-size"),
        (_update(value=-1025.0), "too-large"),
    ],
)
def test_a_wrong_update_is_refused_with_its_reason(update, code):
    with pytest.raises(Refusal) as caught:
        _validate(update)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("weighting", "size"),
    [
        ("uniform", 1.0),
        ("public-size", 0.0),
        ("public-size", 0.5),
        ("public-size", math.inf),
        ("records", 7.5),
        ("records", math.inf),
    ],
)
def test_a_size_that_nobody_has_under_the_weighting_is_refused(weighting, size):
    with pytest.raises(Refusal, match="invalid-size"):
        _validate(_update(value=0.0, size=size), weighting=weighting)


def test_a_size_counts_as_far_as_it_is_believed():
    round = Round(
        number=1, asked=2, before=BEFORE, weighting="public-size", max_sizes={"bank": 4096.0}
    )
    claimed = [round.weight(_update(size=2.0**k)) for k in (11, 12, 13, 23)]
    assert claimed == [2048.0, 4096.0, 4096.0, 4096.0]
    assert round.weight(_update(name="other", size=2.0**23)) == 2.0**23


def test_other_keys_and_dtypes_are_refused():
    extra = AdapterState({A: torch.zeros(2, 3), B: torch.zeros(3, 2)})  # B was not asked for
    double = AdapterState({A: torch.zeros(2, 3, dtype=torch.float64)})
    for state in (extra, double, AdapterState({})):
        with pytest.raises(Refusal, match="invalid-update"):
            _validate(ClientUpdate(institution="bank", round=1, adapter=state))


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, 40))
    ),
    st.integers(0, 3),
)
def test_nobody_is_asked_more_often_than_the_cap_and_every_round_is_full(sizes, seed):
    institutions, per_round, rounds = sizes
    settings = FederationConfig(rounds=rounds, institutions_per_round=per_round)
    cap = settings.participations(institutions)
    asked = collections.Counter({f"bank-{i}": 0 for i in range(institutions)})
    for number in range(1, rounds + 1):
        chosen = base.sample(asked, per_round=per_round, cap=cap, seed=seed, round_number=number)
        assert len(chosen) == len(set(chosen)) == (per_round or institutions)
        assert chosen == sorted(chosen)
        asked.update(chosen)
    assert max(asked.values()) <= cap


def test_the_lot_depends_on_seed_and_round_only():
    asked = {f"bank-{i}": 0 for i in range(20)}
    backwards = dict(reversed(asked.items()))
    draw = {"per_round": 5, "cap": 9}
    first = base.sample(asked, **draw, seed=1, round_number=1)
    assert first == base.sample(backwards, **draw, seed=1, round_number=1)
    assert first != base.sample(asked, **draw, seed=1, round_number=2)
    assert first != base.sample(asked, **draw, seed=2, round_number=1)
