import math

import numpy as np
import pytest
import torch
from scipy import stats

from fedlora.errors import Refusal
from fedlora.models.adapters import AdapterState
from fedlora.privacy.streams import RandomSource
from fedlora.wire.messages import ClientUpdate
from strategies import institution_dp


def _update(name, **tensors):
    return ClientUpdate(institution=name, round=1, adapter=AdapterState(tensors))


def _aggregate(before, updates, *, sigma=1e-12, bound=1.0, seed=0, invalid=0):
    return institution_dp.aggregate(
        before,
        updates,
        max_norm=bound,
        noise_multiplier=sigma,
        answered=len(updates) + invalid,
        source=RandomSource.seeded("test", seed),
    )


def test_long_updates_are_cut_to_the_bound_and_short_ones_kept():
    before = AdapterState({"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[1.0]])})
    long = _update("x", a=torch.tensor([3.0 + 1, 4.0 + 1]), b=torch.tensor([[12.0 + 1]]))  # norm 13
    short = _update("y", a=torch.tensor([1.1, 1.0]), b=torch.tensor([[1.0]]))
    new = _aggregate(before, [long, short], bound=2.0)
    assert new["a"].tolist() == pytest.approx([1 + (6 / 13 + 0.1) / 2, 1 + (8 / 13) / 2], rel=1e-6)
    assert float(new["b"]) == pytest.approx(1 + (24 / 13) / 2, rel=1e-6)


def test_an_update_of_zero_or_of_enormous_size_is_no_nan():
    before = AdapterState({"a": torch.zeros(2)})
    huge = _update("x", a=torch.tensor([3e38, -3e38]))
    still = _update("y", a=torch.zeros(2))
    new = _aggregate(before, [huge, still])
    assert new["a"].tolist() == pytest.approx([math.sqrt(0.5) / 2, -math.sqrt(0.5) / 2])


def test_one_institution_moves_the_sum_by_at_most_the_bound():
    draw = torch.Generator().manual_seed(2)
    before = AdapterState({"a": torch.randn(30, generator=draw)})
    updates = [_update(f"i{k}", a=9 * torch.randn(30, generator=draw)) for k in range(5)]
    zeroed = [*updates[:-1], _update("i4", a=before["a"].clone())]
    moved = 5 * (_aggregate(before, updates)["a"] - _aggregate(before, zeroed)["a"])
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-5)


def test_a_smaller_cohort_gets_the_same_noise_on_its_sum():
    # 20,000 values each; a false alarm of either chi-square test has probability 1e-6
    before = AdapterState({"a": torch.zeros(20_000)})
    for cohort in (1, 4):
        updates = [_update(f"i{k}", a=torch.zeros(20_000)) for k in range(cohort)]
        noise = cohort * _aggregate(before, updates, sigma=3.0, bound=0.5, seed=cohort)["a"]
        energy = float(np.square(noise.double().numpy() / 1.5).sum())
        assert stats.chi2.ppf(5e-7, 20_000) < energy < stats.chi2.isf(5e-7, 20_000)


def test_no_noise_is_refused():
    before = AdapterState({"a": torch.zeros(2)})
    with pytest.raises(Refusal, match="guard-no-noise"):
        _aggregate(before, [_update("x", a=torch.zeros(2))], sigma=0.0)


def test_an_invalid_answer_counts_as_zero():
    before = AdapterState({"a": torch.zeros(1)})
    new = _aggregate(before, [_update("x", a=torch.tensor([0.6]))], invalid=2)
    assert float(new["a"]) == pytest.approx(0.2)
