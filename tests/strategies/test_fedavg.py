import weakref

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.models.adapters import AdapterState
from fedlora.wire.messages import ClientUpdate
from strategies import fedavg
from strategies.base import Round

A = "base_model.model.layer.q.lora_A.weight"
EMPTY = AdapterState({})


def _update(name, tensor, size=0.0):
    return ClientUpdate(institution=name, round=1, adapter=AdapterState({A: tensor}), size=size)


def _round(asked, **values):
    return Round(number=1, asked=asked, before=EMPTY, **values)


def test_the_weighted_mean_by_hand():
    updates = [_update("a", torch.full((2, 3), 1.0)), _update("b", torch.full((2, 3), 5.0))]
    mean = fedavg.aggregate(_round(2), zip(updates, [75.0, 25.0], strict=True))
    assert torch.equal(mean[A], torch.full((2, 3), 2.0))
    assert torch.equal(updates[0].adapter[A], torch.ones(2, 3))


def test_of_nothing_comes_nothing():
    assert len(fedavg.aggregate(_round(3), [])) == 0


@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_the_mean_is_right_to_float32_and_no_order_matters(seed, count, sized):
    draw = np.random.default_rng(seed)
    size = draw.uniform(50, 1e5, count) if sized else np.ones(count)
    values = (draw.normal(size=(count, 40)) * 10.0 ** draw.uniform(-4, 0, 40)).astype(np.float32)
    round = _round(count, weighting="records" if sized else "uniform")
    pairs = [(_update(str(i), torch.from_numpy(v)), float(size[i])) for i, v in enumerate(values)]
    mean = fedavg.aggregate(round, pairs)[A].double().numpy()
    exact = (size / size.sum()) @ values.astype(np.float64)
    largest = np.abs(values).max(0)
    assert (np.abs(mean - exact) <= 2.0**-24 * np.abs(exact) + 2.0**-24 * largest).all()
    for _ in range(3):
        shuffled = [pairs[i] for i in draw.permutation(count)]
        again = fedavg.aggregate(round, shuffled)[A].double().numpy()
        np.testing.assert_allclose(again, mean, rtol=2.0**-23, atol=1e-30)


def test_an_update_is_let_go_before_the_next_one_is_asked_for():
    def stream():
        for i in range(4):
            update = _update(str(i), torch.full((2,), float(i)))
            alive = weakref.ref(update.adapter)
            yield update, 1.0
            del update
            assert alive() is None

    assert fedavg.aggregate(_round(4), stream())[A].tolist() == [1.5, 1.5]
