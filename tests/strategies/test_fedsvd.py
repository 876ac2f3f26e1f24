import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.models.adapters import AdapterState
from fedlora.wire.wire import ClientUpdate
from strategies import fedavg, fedsvd
from strategies.base import Round
from tests.strategies.random_adapters import HEAD, MAGNITUDE, A, B, normal, product, random_adapter

PARTS = STRATEGY_TABLE["fedsvd"].parts_sent(1)
EYE = {"rtol": 0, "atol": 1e-6}


def _round(before, **values):
    return Round(**{"number": 1, "asked": 9, "before": before, "parts": PARTS} | values)


def _updates(states, weights=None):
    weights = weights if weights is not None else [1.0] * len(states)
    return [
        (ClientUpdate(institution=f"bank-{i:02}", round=1, adapter=state.only(PARTS)), weight)
        for i, (state, weight) in enumerate(zip(states, weights, strict=True))
    ]


def test_two_institutions_by_hand():
    """The mean B is [[2, 0], [0, 6]], so B A is [[0, 4, 0], [6, 0, 0]]: singular values 6 and 4."""
    before = AdapterState(
        {A: torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]), B: torch.zeros(2, 2)}
    )
    sent = [
        AdapterState({B: torch.tensor(values)})
        for values in ([[1.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 12.0]])
    ]
    new = fedsvd.aggregate(_round(before), _updates(sent))
    # Each singular pair has a sign of its own, which the product does not see.
    assert new[A].abs().tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert new[B].abs().tolist() == [[0.0, 4.0], [6.0, 0.0]]
    assert (new[B] @ new[A]).tolist() == [[0.0, 4.0, 0.0], [6.0, 0.0, 0.0]]
    assert before[A].tolist() == [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]] and not before[B].any()


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 11),
    count=st.integers(1, 6),
    size=st.sampled_from([1e-4, 1.0, 30.0]),
)
def test_the_product_is_the_mean_one_and_the_rows_of_a_are_orthonormal(seed, rank, count, size):
    draw = np.random.default_rng(seed)
    before = random_adapter(draw, rank)
    states = [random_adapter(draw, rank) for _ in range(count)]
    states = [state.updated({B: state[B] * size}) for state in states]
    weights = draw.uniform(1, 100, count)
    updates = _updates(states, weights)
    round = _round(before)
    new = fedsvd.aggregate(round, updates)
    mean = sum(w * s[B].double() for s, w in zip(states, weights, strict=True)) / weights.sum()
    dense = mean @ before[A].double()
    torch.testing.assert_close(product(new), dense, rtol=0, atol=1e-6 * float(dense.norm()))
    torch.testing.assert_close(new[A] @ new[A].T, torch.eye(rank), **EYE)
    values = torch.linalg.svdvals(dense)[:rank]
    gram = new[B].double().T @ new[B].double()
    torch.testing.assert_close(
        gram, values.square().diag(), rtol=1e-5, atol=1e-6 * float(values[0]) ** 2
    )
    plain = fedavg.aggregate(round, updates)
    assert all(torch.equal(new[name], plain[name]) for name in (MAGNITUDE, HEAD))
    assert new.validate_against(before) is None
    again = fedsvd.aggregate(round, reversed(updates))
    torch.testing.assert_close(product(again), product(new), rtol=0, atol=1e-5 * max(size, 1.0))


def test_a_layer_whose_b_is_zero_keeps_its_a_to_the_last_bit():
    draw = np.random.default_rng(1)
    still, moved = "base.k.lora_{}.weight", "base.q.lora_{}.weight"
    before = AdapterState(
        {
            name.format(part): normal(draw, *shape)
            for name in (still, moved)
            for part, shape in (("A", (4, 11)), ("B", (14, 4)))
        }
    )
    before = before.updated({still.format("B"): torch.zeros(14, 4)})
    new = fedsvd.aggregate(_round(before), _updates([before] * 3))
    assert torch.equal(new[still.format("A")], before[still.format("A")])
    assert not new[still.format("B")].any()
    assert not torch.equal(new[moved.format("A")], before[moved.format("A")])
