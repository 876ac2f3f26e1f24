"""Training at home: Adam, means of its iterates, and several institutions in shared passes."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from client import home_training
from client.home_training import HomePlan, Trainee, _TailMeans, expected_errors, train_at_home
from client.training import shuffled
from fedlora.data import records
from fedlora.gradients.lora_layers import lora_layers
from fedlora.models import trainable
from fedlora.models.adapters import PARTS, AdapterState, kind, parameters, residual_names
from fedlora.privacy.streams import RandomSource

PLAN = HomePlan(batch_size=16, physical_batch=8, learning_rate=0.01, head_learning_rate=0.03)
ROUNDING = 1e-3
"""Two computations of one gradient differ by rounding, about 1e-6 of its size. Adam divides by the
gradient's size, so that a step, which is about a learning rate, differs by 1e-6 of it where the
gradient is not tiny. A thousandth of a learning rate a step leaves room for tiny ones."""


@pytest.fixture
def bank(tiny_config):
    """Loads a model for four banks; their adapters differ and have no tensor of zeros."""

    def make(**values):
        config = tiny_config(**values)
        federation = records.load(config)
        work = trainable.load(config, federation.labels)
        work.train_only([p for p in PARTS if p in {kind(name) for name in work.start}])
        return SimpleNamespace(
            work=work,
            shards=[federation.train(i) for i in range(4)],
            starts=[moved(work.start, i) for i in range(4)],
        )

    return make


def moved(state, seed, parts=PARTS):
    """An adapter with random changes of some parts."""
    generator = torch.Generator().manual_seed(seed)
    change = {n: torch.randn(t.shape, generator=generator) / 10 for n, t in state.items()}
    return state.updated({n: t + change[n] for n, t in state.items() if kind(n) in parts})


def with_residual(state, work, seed=9):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, layer in lora_layers(work.model):
        base = layer.get_base_layer()
        shapes = ((2, base.in_features), (base.out_features, 2))
        for name, shape in zip(residual_names(path), shapes, strict=True):
            found[name] = torch.randn(shape, generator=generator) / 4
    return state.updated(found)


def trainee(shard, start, steps, seed=0):
    return Trainee(
        shard=shard, start=start, steps=steps, source=RandomSource.seeded("test", "home", seed)
    )


def cohort(bank, steps):
    return [
        trainee(shard, start, each, seed)
        for seed, (shard, start, each) in enumerate(
            zip(bank.shards, bank.starts, steps, strict=True)
        )
    ]


def never(*args, **options):
    raise AssertionError("passes were shared")


def assert_near(found, expected, *, steps, rate=PLAN.head_learning_rate):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=ROUNDING * rate * steps)


STEPS = [(1, 2), (3,), (2, 6), (6,)]


@pytest.mark.parametrize("proximal", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [40, 2048], ids=["many passes", "one pass"])
def test_institutions_that_share_passes_get_the_adapters_that_each_gets_alone(
    bank, proximal, tokens, monkeypatch
):
    made, plan = bank(), dataclasses.replace(PLAN, proximal=proximal)
    monkeypatch.setattr(home_training, "PASS_TOKENS", tokens)
    trainees = cohort(made, STEPS)
    trainees[1] = dataclasses.replace(trainees[1], shard=trainees[1].shard.select(range(5)))
    together = train_at_home(made.work, trainees, plan)
    monkeypatch.setattr(home_training, "_train_together", never)
    monkeypatch.setattr(home_training, "_can_share", lambda *_: False)
    for one, adapters in zip(trainees, together, strict=True):
        (alone,) = train_at_home(made.work, [one], plan)
        assert len(alone) == len(adapters) == len(one.steps)
        for steps, found, expected in zip(one.steps, adapters, alone, strict=True):
            assert_near(found, expected, steps=steps)
            far = max(float((found[n] - one.start[n]).abs().max()) for n in found)
            assert far > 100 * ROUNDING * PLAN.head_learning_rate  # it moved, and not by rounding


@pytest.mark.parametrize("shared", [False, True])
def test_a_trainee_stops_where_records_held_back_see_no_fewer_errors(bank, shared, monkeypatch):
    """The errors are given; those who go on get what they get without anyone stopping."""
    made, steps = bank(), (1, 2, 4, 8)
    errors = [[0.5, 0.4, 0.3], [0.5, 0.5], [0.5, 0.4, 0.4], [np.nan]]  # as long as asked
    left = [list(each) for each in errors]
    numbers = {}

    def measured(work, adapters, shards, physical_batch):
        found = [left[numbers[id(shard)]].pop(0) for shard in shards]
        for adapter, shard in zip(adapters, shards, strict=True):
            reached[numbers[id(shard)]].append(adapter)
            moved(adapter, 0).load_into(work.model)  # it may leave anything in the model
        return found

    reached = [[], [], [], []]
    if not shared:
        monkeypatch.setattr(home_training, "_can_share", lambda *_: False)
    trainees = cohort(made, [steps] * 4)
    expected = train_at_home(made.work, trainees, PLAN)
    monkeypatch.setattr(home_training, "expected_errors", measured)
    held = [shard.select(range(3)) for shard in made.shards]
    numbers |= {id(shard): i for i, shard in enumerate(held)}
    asked = [dataclasses.replace(t, held=held[i]) for i, t in enumerate(trainees)]
    found = train_at_home(made.work, asked, PLAN)
    assert [len(each) for each in found] == [4, 2, 3, 1] and left == [[], [], [], []]
    for i, adapters in enumerate(found):
        assert len(reached[i]) == len(errors[i])
        for adapter, one in zip(adapters, expected[i], strict=False):
            assert_near(adapter, one, steps=steps[-1])
        for adapter, one in zip(reached[i], adapters, strict=False):
            assert all(torch.equal(adapter[n], one[n]) for n in one)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"adapter.dropout": 0.3},
        {"adapter.method": "dora", "training.gradient-checkpointing": True},
    ],
    ids=["plain", "dropout", "dora"],
)
def test_a_measurement_on_records_held_back_leaves_training_as_it_is(
    bank, shared, values, monkeypatch
):
    made = bank(**values)
    if not shared:
        monkeypatch.setattr(home_training, "_can_share", lambda *_: False)
    trainees = cohort(made, [(2, 4, 6)] * 4)
    measure = home_training.expected_errors
    expected = train_at_home(made.work, trainees, PLAN)

    def falling(*of):
        calls.append(measure(*of))
        return [1.0 / len(calls)] * len(of[1])

    calls = []
    monkeypatch.setattr(home_training, "expected_errors", falling)
    held = [dataclasses.replace(t, held=t.shard.select(range(3))) for t in trainees]
    found = train_at_home(made.work, held, PLAN)
    assert len(calls) >= 2 and all(np.isfinite(each).all() for each in calls)
    for adapters, one in zip(found, expected, strict=True):
        assert len(adapters) == len(one) == 3
        for adapter, other in zip(adapters, one, strict=True):
            assert all(torch.equal(adapter[name], tensor) for name, tensor in other.items())


def test_no_institutions_are_trained_to_no_adapters(bank):
    work = bank().work
    assert train_at_home(work, [], PLAN) == []
    assert expected_errors(work, [], [], 8) == []


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_adapters_are_means_of_the_second_half_of_adams_iterates(
    bank, proximal, shared, monkeypatch
):
    """Against torch.optim.Adam with amsgrad and decay off, the pull as a term of the loss."""
    made = bank()
    work, shard, start, steps = made.work, made.shards[0], made.starts[0], (1, 2, 5, 8)
    one = trainee(shard, start, steps)
    if not shared:
        monkeypatch.setattr(home_training, "_can_share", lambda *_: False)
    plan = dataclasses.replace(PLAN, proximal=proximal)
    (found,) = train_at_home(work, [one], plan)

    start.load_into(work.model)
    named = parameters(work.model)
    optimizer = torch.optim.Adam(
        [
            {
                "params": [p],
                "lr": 0.03 if name.endswith(("weight", "bias")) and kind(name) == "head" else 0.01,
            }
            for name, p in named.items()
        ]
    )
    iterates = []
    for rows in shuffled(
        len(shard), 16, 8, RandomSource.seeded("test", "home", 0).child("shuffle")
    ):
        optimizer.zero_grad()
        batch = work.task.collate(shard, rows)
        loss = work.task.losses(work.model, batch, work.labels).mean()
        pull = sum((p - start[name]).square().sum() for name, p in named.items())
        (loss + proximal / 2 * pull).backward()
        optimizer.step()
        iterates.append(AdapterState.read(work.model))
    for count, adapter in zip(steps, found, strict=True):
        half = iterates[count // 2 : count]
        mean = {n: torch.stack([state[n] for state in half]).mean(0) for n in start}
        assert_near(adapter, mean, steps=count)


def test_the_first_step_moves_a_head_by_its_own_learning_rate(bank):
    made = bank()
    ((after,),) = train_at_home(made.work, [trainee(made.shards[0], made.starts[0], (1,))], PLAN)
    for name, tensor in after.items():
        rate = PLAN.head_learning_rate if kind(name) == "head" else PLAN.learning_rate
        step = float((tensor - made.starts[0][name]).abs().max())
        assert step == pytest.approx(rate, rel=1e-3)  # Adam's first step is a learning rate long
    assert {kind(name) for name in after} == {"A", "B", "head"}


def test_tail_means_are_plain_means_of_the_second_half():
    value = torch.zeros(3)
    draws = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    tail = _TailMeans((1, 2, 3, 7, 8), [value])
    for step, draw in enumerate(draws, 1):
        value.copy_(draw)
        tail.add(step)
    assert set(tail.means) == {1, 2, 3, 7, 8}
    for steps, (mean,) in tail.means.items():
        torch.testing.assert_close(mean, draws[steps // 2 : steps].mean(0))


@pytest.mark.parametrize("shared", [False, True])
def test_an_institution_with_few_records_or_one_class_trains(bank, shared, monkeypatch):
    made = bank()
    if not shared:
        monkeypatch.setattr(home_training, "_can_share", lambda *_: False)
    shard = made.shards[0]
    same = shard.select(np.flatnonzero(shard.targets == shard.targets[0]))
    for rows in (shard.select([3]), shard.select(range(5)), same):
        ((after,),) = train_at_home(made.work, [trainee(rows, made.starts[0], (10,))], PLAN)
        before_loss, after_loss = expected_errors(
            made.work, [made.starts[0], after], [rows, rows], 8
        )
        assert after_loss < before_loss


@pytest.mark.parametrize(
    "values",
    [
        {"adapter.method": "dora"},
        {"adapter.dropout": 0.2},
        {"training.gradient-checkpointing": True, "adapter.method": "dora"},
        None,  # padded rows
    ],
    ids=["dora", "dropout", "dora, checkpointing", "padded"],
)
def test_models_that_cannot_share_passes_train_one_institution_after_the_other(
    bank, values, monkeypatch
):
    made = bank(**(values or {}))
    work = made.work if values else dataclasses.replace(made.work, first_position=None)
    monkeypatch.setattr(home_training, "_train_together", never)
    monkeypatch.setattr(home_training, "_shared_passes", never)
    trained = train_at_home(work, cohort(made, [(12,)] * 4), PLAN)
    ends = [adapters[0] for adapters in trained]
    before = expected_errors(work, made.starts, made.shards, 8)
    assert all(
        b > a for b, a in zip(before, expected_errors(work, ends, made.shards, 8), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_bases_train_and_give_what_each_institution_gets_alone(
    bank, quantization, monkeypatch
):
    made = bank(**{"model.quantization": quantization, "model.dtype": "bf16"})
    trainees = cohort(made, [(6,)] * 4)
    together = [adapters[0] for adapters in train_at_home(made.work, trainees, PLAN)]
    before = expected_errors(made.work, made.starts, made.shards, 8)
    after = expected_errors(made.work, together, made.shards, 8)
    assert all(b > a for b, a in zip(before, after, strict=True))
    monkeypatch.setattr(home_training, "_can_share", lambda *_: False)
    for (alone,), found, shard in zip(
        train_at_home(made.work, trainees, PLAN), together, made.shards, strict=True
    ):
        # activations are bf16, which rounds to 0.4 %
        (a,), (b,) = (expected_errors(made.work, [s], [shard], 8) for s in (alone, found))
        assert a == pytest.approx(b, rel=0.02)


def test_adapters_that_differ_in_a_frozen_part_are_each_trained_with_their_own(bank):
    made = bank()
    made.work.train_only(("B", "head"))
    trainees = cohort(made, [(4,)] * 4)
    together = train_at_home(made.work, trainees, PLAN)
    for one, (found,) in zip(trainees, together, strict=True):
        ((alone,),) = train_at_home(made.work, [one], PLAN)
        assert_near(found, alone, steps=4)
        assert all(torch.equal(found[n], one.start[n]) for n in found if kind(n) == "A")


@pytest.mark.parametrize("alike", [True, False])
def test_residuals_are_computed_with_and_left_as_they_are(bank, alike):
    """Of all institutions alike or of each its own, which cannot share passes."""
    made = bank()
    made.starts = [
        with_residual(s, made.work, 9 if alike else i) for i, s in enumerate(made.starts)
    ]
    trainees = cohort(made, [(4,)] * 4)
    together = train_at_home(made.work, trainees, PLAN)
    errors = expected_errors(made.work, [found for (found,) in together], made.shards, 8)
    for one, (found,), error in zip(trainees, together, errors, strict=True):
        ((alone,),) = train_at_home(made.work, [one], PLAN)
        assert_near(found, alone, steps=4)
        residual = [n for n in found if kind(n) == "residual"]
        assert residual
        assert all(torch.equal(found[n], one.start[n]) for n in residual)
        bare = AdapterState({n: t for n, t in found.items() if n not in residual})
        (without,) = expected_errors(made.work, [bare], [one.shard], 8)
        assert abs(without - error) > 1e-5  # the residual counts


def test_a_model_that_had_a_residual_trains_an_adapter_without_one_as_a_fresh_model_does(bank):
    made = bank()
    one = [trainee(made.shards[0], made.starts[0], (3,))]
    ((before,),) = train_at_home(made.work, one, PLAN)
    train_at_home(
        made.work,
        [dataclasses.replace(one[0], start=with_residual(made.starts[0], made.work))],
        PLAN,
    )
    ((after,),) = train_at_home(made.work, one, PLAN)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(kind(n) == "residual" for n in after)


@pytest.mark.parametrize("shared", [False, True])
def test_expected_errors_are_one_minus_the_probability_of_the_right_class(
    bank, shared, monkeypatch
):
    made = bank()
    if not shared:
        monkeypatch.setattr(home_training, "_can_share", lambda *_: False)
    shards = [shard.select(range(7 + i)) for i, shard in enumerate(made.shards)]
    found = expected_errors(made.work, made.starts, shards, 8)
    for error, start, shard in zip(found, made.starts, shards, strict=True):
        start.load_into(made.work.model)
        batch = made.work.task.collate(shard, range(len(shard)))
        with torch.no_grad():
            logits = made.work.task.logits(made.work.model, batch, made.work.labels)
        right = logits.softmax(1)[range(len(shard)), shard.targets]
        assert error == pytest.approx(1 - float(right.mean()), rel=1e-5)
    assert len(set(found)) == 4


def test_choices_are_made_without_dropout(bank):
    def errors(**values):
        made = bank(**values)
        return home_training.expected_errors(made.work, made.starts, made.shards, 8)

    plain = errors()
    assert errors(**{"adapter.dropout": 0.5}) == pytest.approx(plain, rel=1e-5)
