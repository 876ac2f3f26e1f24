"""The models of an institution at home: which records choose, and what is kept and said of them."""

import dataclasses
import stat

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from client import alone_models, home, home_cohort, home_training
from client.home import WEIGHTS, mixed, models_alone, models_at_home
from client.home_models import Choice, Setting
from client.institution import Institution
from fedlora.data import records
from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.data.shards import Federation
from fedlora.errors import InputError
from fedlora.models import models, trainable
from fedlora.models.adapters import AdapterState
from fedlora.privacy.streams import RandomSource
from fedlora.runs.comparison import text_numbers
from fedlora.wire.messages import EvaluateOrder
from tests.client.test_home_training import moved, with_residual

SMALL = {"home.method": "interpolate", "home.steps": 8, "home.learning-rate": 0.02}


@pytest.fixture
def banks(tiny_config, monkeypatch):
    """Four banks after a run that released a random adapter, and the order to compare.

    Their own models are not given up for the models alone, though these are better.
    """
    monkeypatch.setattr(home, "is_better", lambda *_: False)

    def make(residual=False, **values):
        if residual:
            values |= {"federation.strategy": "exact", "federation.server-optimizer": "none"}
            values["federation.server-learning-rate"] = 1.0
        config = tiny_config(**(SMALL | values))
        work = trainable.load(config, records.load(config).labels)
        released = moved(work.start, 5)
        if residual:
            released = with_residual(released, work)
        order = EvaluateOrder(run="a1", round=1, save=True, adapter=released)
        return [Institution.locate(config, i) for i in range(4)], order, work, config

    return make


@pytest.mark.parametrize(
    ("copies", "held_back"),
    [([1] * 20, 4), ([2] * 10, 4), ([90, *[1] * 10], 2), ([3] * 4, 0), ([20], 0)],
)
def test_copies_of_a_record_are_held_back_together_or_not_at_all(copies, held_back):
    ids = [[kind] for kind, count in enumerate(copies) for _ in range(count)]
    rows = shard_of(Encoded(ids=ids, targets=[0] * len(ids), truncated=[False] * len(ids)))
    one = home.Home(
        shared=AdapterState({}), shard=rows, source=RandomSource.seeded("copies", 1), alone=None
    )
    fit, validation = home._split(one)
    texts = [{int(part.row(i)[0]) for i in range(len(part))} for part in (fit, validation)]
    assert texts[0].isdisjoint(texts[1]) and texts[0] | texts[1] == set(range(len(copies)))
    assert len(fit) + len(validation) == len(ids)
    room = round(home.HOME_VALIDATION * len(ids))
    assert len(validation) == held_back <= room


def homes_of(institutions, order):
    return [institution.home(institution.released(order)) for institution in institutions]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def hashes(shard):
    return [record.tobytes() for record in shard.records]


def test_a_mixture_is_a_weighted_mean_of_all_but_the_residual():
    shared = AdapterState(
        {
            "l.lora_A.weight": torch.tensor([[1.0, 2.0]]),
            "l.lora_B.weight": torch.tensor([[4.0]]),
            "l.residual_A.weight": torch.tensor([[7.0, 7.0]]),
            "l.residual_B.weight": torch.tensor([[8.0]]),
            "classifier.weight": torch.tensor([[0.0]]),
        }
    )
    trained = AdapterState({n: torch.full_like(t, 10.0) for n, t in shared.items()})
    found = mixed(shared, trained, 0.25)
    assert {n: t.tolist() for n, t in found.items()} == {
        "l.lora_A.weight": [[3.25, 4.0]],
        "l.lora_B.weight": [[5.5]],
        "l.residual_A.weight": [[7.0, 7.0]],
        "l.residual_B.weight": [[8.0]],
        "classifier.weight": [[2.5]],
    }
    assert same(mixed(shared, trained, 0.0), shared)
    assert same(mixed(shared, trained, 1.0), trained)


def test_choices_are_made_on_training_records_that_the_trial_did_not_train_on(banks, monkeypatch):
    institutions, order, _, _ = banks()
    trained, measured = [], []
    train, measure = home.train_at_home, home.expected_errors

    def spied_train(work, trainees, plan):
        trained.append([one.shard for one in trainees])
        for one, everything in zip(trainees, records_of, strict=True):
            if one.held is None:
                assert one.steps[-1:] == one.steps  # stops at none of them
            else:
                assert sorted(hashes(one.shard) + hashes(one.held)) == everything
                measured.append(one.held)
        return train(work, trainees, plan)

    def spied_measure(work, adapters, shards, physical_batch):
        measured.extend(shards)
        return measure(work, adapters, shards, physical_batch)

    monkeypatch.setattr(home, "train_at_home", spied_train)
    monkeypatch.setattr(home, "expected_errors", spied_measure)
    monkeypatch.setattr(home_training, "expected_errors", spied_measure)
    monkeypatch.setattr(home, "COMPARED_FROM", 2)
    homes = homes_of(institutions, order)
    records_of = [sorted(hashes(one.shard)) for one in homes]

    def held_out(*_):
        raise AssertionError("a held-out row was read")

    monkeypatch.setattr(Federation, "held_out", held_out)
    monkeypatch.setattr(Federation, "pooled_held_out", held_out)
    institutions[0].models_at_home(homes)
    assert len(trained) == 4
    trained = [trained[i] for i in (0, 2, 1, 3)]  # trials first
    validations = {tuple(hashes(shard)) for shard in measured}
    assert len(validations) == 4 < len(measured)
    for i, everything in enumerate(records_of):
        for shards in trained[:2]:
            fit = hashes(shards[i])
            (held,) = (v for v in validations if sorted([*fit, *v]) == everything)
            assert len(held) == round(0.2 * len(everything))
        for shards in trained[2:]:
            assert sorted(hashes(shards[i])) == everything


def test_runs_of_a_sweep_train_a_model_alone_once(banks, tmp_path, monkeypatch):
    """Another epsilon or rate of the server takes it; other settings at home train their own."""
    trained, train = [], home.train_at_home

    def spied(work, trainees, plan):
        trained.append(trainees)
        return train(work, trainees, plan)

    monkeypatch.setattr(home, "train_at_home", spied)

    def run(**values):
        institutions, order, *_ = banks(**values)
        trained.clear()
        return institutions[0].models_at_home(homes_of(institutions, order)), len(trained)

    privacy = {"privacy.epsilon": 8.0}
    alone, calls = run()  # outside a sweep
    assert calls == 4
    kept = tmp_path / "kept"
    monkeypatch.setenv(alone_models.DIRECTORY, str(kept))
    first, calls = run(**privacy)
    assert calls == 4
    files = sorted(kept.iterdir())
    assert len(files) == 4 and stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    second, calls = run(**{"privacy.epsilon": 1.0, "federation.server-learning-rate": 0.001})
    assert calls == 2 and sorted(kept.iterdir()) == files
    for made, taken, outside in zip(first, second, alone, strict=True):
        assert same(made.alone, taken.alone) and same(made.own, taken.own)
        assert made.choice == taken.choice
        assert same(made.alone, outside.alone)
    assert run(**{"federation.strategy": "ffa"})[1] == 2
    assert run(**(privacy | {"home.steps": 4}))[1] == 4
    files[0].write_bytes(files[0].read_bytes()[:-1])
    again, calls = run()
    assert calls == 4  # the institution of the damaged file trains again
    assert sum(same(a.alone, b.alone) for a, b in zip(first, again, strict=True)) >= 3
    assert all(AdapterState(load_file(file)).keys() == first[0].alone.keys() for file in files)


def test_whatever_makes_another_model_alone_has_another_file(banks, tmp_path, monkeypatch):
    monkeypatch.setenv(alone_models.DIRECTORY, str(tmp_path))
    institutions, _, _, config = banks()
    shard, other = (records.load(config).train(i) for i in range(2))

    def place(base="base", name=institutions[0].name, rows=shard, **values):
        return alone_models.place(config.replace(values), base, name, rows)

    assert place() == place(**{"privacy.epsilon": 2.0, "federation.rounds": 7})
    others = [
        place("other base"),
        place(name=institutions[1].name),
        place(rows=other),
        *(
            place(**{key: value})
            for key, value in (
                ("seed", 9),
                ("home.steps", 4),
                ("home.batch-size", 3),
                ("home.learning-rate", 0.5),
                ("home.head-learning-rate", 0.5),
                ("training.max-length", 9),
                ("adapter.rank", 5),
                ("adapter.method", "dora"),
                ("model.dtype", "bf16"),
            )
        ),
    ]
    assert len({place(), *others}) == 1 + len(others) and None not in others
    assert place(**{"adapter.start": str(tmp_path)}) is None


def test_other_tokens_and_another_order_of_classes_make_another_model_alone(
    banks, tmp_path, monkeypatch
):
    monkeypatch.setenv(alone_models.DIRECTORY, str(tmp_path))
    institutions, order, work, _ = banks()
    one = institutions[0]
    files = {one.home(order.adapter).alone, one.home(order.adapter).alone}
    assert len(files) == 1 and None not in files
    with monkeypatch.context() as patch:
        patch.setattr(records, "encoding", lambda _: "another tokenizer")
        files.add(one.home(order.adapter).alone)
    other = dataclasses.replace(work, labels=work.labels[::-1])
    monkeypatch.setattr(Institution, "_load", lambda _: other)
    files.add(one.home(order.adapter).alone)
    assert len(files) == 3


def test_a_model_alone_that_cannot_be_kept_costs_nothing_else(banks, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(alone_models.DIRECTORY, str(tmp_path / "file" / "below"))
    institutions, order, *_ = banks()
    found = institutions[0].models_at_home(homes_of(institutions, order))
    assert len(found) == 4


def test_a_deployed_institution_keeps_no_model_alone(banks, tmp_path, monkeypatch):
    monkeypatch.setenv(alone_models.DIRECTORY, str(tmp_path / "kept"))
    institutions, order, *_ = banks()
    one = dataclasses.replace(institutions[0], simulated=False)
    assert one.home(order.adapter).alone is None
    assert homes_of(institutions[:1], order)[0].alone is not None


@pytest.mark.parametrize("method", ["fine-tune", "interpolate", "ditto"])
def test_the_choice_is_the_one_with_the_fewest_expected_errors(banks, method):
    """By hand, from the trial's own adapters."""
    institutions, order, work, config = banks(**{"home.method": method})
    one = institutions[0].home(institutions[0].released(order))
    (found,) = models_at_home(work, [one], config.home, 64)
    fit, validation = home._split(one)
    assert validation is not None

    def trial(start, name, rate, proximal, steps):
        plan = home_training.HomePlan(
            batch_size=config.home.batch_size,
            physical_batch=64,
            learning_rate=0.02,
            head_learning_rate=rate,
            proximal=proximal,
        )
        source = one.source.child(name, "fit")
        trainee = home_training.Trainee(shard=fit, start=start, steps=steps, source=source)
        (adapters,) = home_training.train_at_home(work, [trainee], plan)
        return adapters

    def error(adapter):
        return home_training.expected_errors(work, [adapter], [validation], 64)[0]

    alone = trial(work.start, "alone", config.home.head_learning_rate, 0.0, (2, 4, 8))
    steps = (2, 4, 8)[min(range(3), key=lambda k: error(alone[k]))]
    if method == "interpolate":
        start = one.shared.updated(work.start.only(("head",)))
        assert not start["base_model.model.classifier.weight"].any()
        (own,) = trial(start, "own", config.home.head_learning_rate, 0.0, (steps,))
    else:
        (own,) = trial(one.shared, "own", 0.02, 0.1 if method == "ditto" else 0.0, (steps,))
    weight = 1.0
    if method != "fine-tune":
        weight = min(WEIGHTS, key=lambda w: error(mixed(one.shared, own, w)))
    setting = Setting(steps, 0.02)
    assert found.choice == Choice(
        alone=setting, own=setting, weight=weight, held_back=len(validation)
    )


@pytest.mark.parametrize("model", ["alone", "own"])
def test_rates_and_the_steps_of_alone_are_chosen_together_for_each_institution(
    banks, model, monkeypatch
):
    """By hand: the least expected error of the trials up to the first that is no better.

    The own model takes the steps of the model alone.
    """
    monkeypatch.setattr(home, "COMPARED_FROM", 2)
    rates = (1e-6, 0.05, 5.0)
    institutions, order, work, config = banks(
        **{"home.learning-rate": rates, "home.method": "fine-tune"}
    )
    homes = homes_of(institutions, order)
    found = models_at_home(work, homes, config.home, 64)
    stopped, taken = 0, set()
    for one, models_of_one in zip(homes, found, strict=True):
        fit, validation = home._split(one)
        of_alone = models_of_one.choice.alone.steps
        steps = (2, 4, 8) if model == "alone" else (of_alone,)
        errors = {}
        for rate in rates:
            plan = home_training.HomePlan(
                batch_size=32,
                physical_batch=64,
                learning_rate=rate,
                head_learning_rate=config.home.head_learning_rate if model == "alone" else rate,
            )
            trainee = home_training.Trainee(
                shard=fit,
                start=work.start if model == "alone" else one.shared,
                steps=steps,
                source=one.source.child(model, "fit"),
            )
            ((*adapters,),) = home_training.train_at_home(work, [trainee], plan)
            before = np.inf
            for count, adapter in zip(steps, adapters, strict=True):
                (error,) = home_training.expected_errors(work, [adapter], [validation], 64)
                errors[Setting(count, rate)] = error
                if not error < before:
                    stopped += count < steps[-1]
                    break
                before = error
        chosen = getattr(models_of_one.choice, model)
        taken.add(chosen.steps)
        assert errors[chosen] == pytest.approx(min(errors.values()), abs=1e-6)
        assert len({round(error, 3) for error in errors.values()}) > 1
    assert len(taken) > 1 and (stopped or model == "own")


@pytest.mark.parametrize(
    ("most", "tried"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (8, (2, 4, 8)),
        (24, (6, 12, 24)),
        (60, (15, 30, 60)),
        (120, (30, 60, 120)),
        (239, (59, 119, 239)),
        (240, (30, 60, 120, 240)),
    ],
)
def test_a_model_alone_tries_the_most_steps_and_its_halves(most, tried):
    assert home.checkpoints(most) == tried


@pytest.mark.parametrize(("few", "steps"), [(2, 2), (3, 8)])
def test_a_model_alone_stops_only_from_a_number_of_steps_on(banks, monkeypatch, few, steps):
    """Errors of 0.5, 0.5 and 0.3 after 2, 4 and 8 steps: whoever may stop at 2 never sees 0.3."""
    monkeypatch.setattr(home, "COMPARED_FROM", few)
    counts, train = {}, home.train_at_home

    def spied(work, trainees, plan):
        found = train(work, trainees, plan)
        for one, adapters in zip(trainees, found, strict=True):
            counts.update(zip(map(fingerprint, adapters), one.steps, strict=False))
        return found

    def fingerprint(adapter):
        return b"".join(tensor.numpy().tobytes() for tensor in adapter.values())

    def measured(work, adapters, shards, physical_batch):
        errors = {2: 0.5, 4: 0.5, 8: 0.3}
        return [errors.get(counts.get(fingerprint(adapter)), 0.5) for adapter in adapters]

    monkeypatch.setattr(home, "train_at_home", spied)
    monkeypatch.setattr(home, "expected_errors", measured)
    monkeypatch.setattr(home_training, "expected_errors", measured)
    institutions, order, work, config = banks()
    found = models_at_home(work, homes_of(institutions, order), config.home, 64)
    assert {one.choice.alone.steps for one in found} == {steps}
    assert {one.choice.own.steps for one in found} == {steps}


def test_the_chosen_settings_train_both_models_anew_on_all_records(banks, monkeypatch):
    institutions, order, work, config = banks(**{"home.method": "ditto"})
    calls, train = [], home.train_at_home

    def spied(work, trainees, plan):
        calls.append((trainees, train(work, trainees, plan)))
        return calls[-1][1]

    monkeypatch.setattr(home, "train_at_home", spied)
    homes = homes_of(institutions, order)
    found = models_at_home(work, homes, config.home, 64)
    _, (alone, alone_found), _, (own, _) = calls
    for i, (one, made) in enumerate(zip(homes, found, strict=True)):
        for trainee, setting, start in (
            (alone[i], made.choice.alone, work.start),
            (own[i], made.choice.own, one.shared),
        ):
            assert same(trainee.start, start)
            assert trainee.steps == (setting.steps,)
            assert trainee.shard is one.shard
        assert same(made.alone, alone_found[i][0])


@pytest.mark.parametrize(
    ("better", "worse", "found"),
    [
        (0, 0, False),
        (1, 0, False),  # one standard error and no more
        (2, 0, True),
        (3, 1, False),  # 2 is the standard error
        (4, 1, True),
        (0, 9, False),
        (30, 24, False),
        (32, 24, True),
    ],
)
def test_alone_is_better_beyond_a_standard_error_of_the_records_on_which_the_two_differ(
    better, worse, found
):
    alone = [True] * better + [False] * worse + [True, False] * 7
    own = [False] * better + [True] * worse + [True, False] * 7
    kinds = np.arange(len(alone))
    assert home.is_better(alone, own, kinds) == found
    assert home.is_better(alone[::-1], own[::-1], kinds) == found
    for copies in (2, 5):  # say nothing more
        assert home.is_better(alone * copies, own * copies, np.tile(kinds, copies)) == found


def test_copies_with_other_labels_count_by_their_sum():
    """Of one kind the model alone is right three times and wrong once: 2; then three times 1."""
    alone = [True, True, True, False, True, False, False]
    own = [not right for right in alone]
    kinds = np.array([0, 0, 0, 0, 1, 2, 3])
    assert not home.is_better(alone, own, kinds)  # 2 + 1 - 1 - 1 against the root of 4 + 3
    assert home.is_better(alone[:5], own[:5], kinds[:5])  # 3 against the root of 5


def test_the_model_alone_stays_where_it_was_right_on_more_of_the_records_held_back(
    banks, monkeypatch, tmp_path
):
    """One institution of four, in a run and in the next of its sweep, which takes models alone."""
    monkeypatch.setenv(alone_models.DIRECTORY, str(tmp_path))
    institutions, order, work, config = banks(**{"privacy.epsilon": 8.0})
    homes = homes_of(institutions, order)
    seen, own_trainings, train = [], [], home.train_at_home

    def second(alone, own, kinds):
        seen.append((alone, own, kinds.tolist()))
        return len(seen) % 4 == 2

    def spied(work, trainees, plan):
        own_trainings.append(len(trainees))
        return train(work, trainees, plan)

    monkeypatch.setattr(home, "is_better", second)
    monkeypatch.setattr(home, "train_at_home", spied)
    first, again = (models_at_home(work, homes, config.home, 64) for _ in range(2))
    assert own_trainings == [4, 4, 4, 3, 4, 3] and seen[:4] == seen[4:]
    for found in (first, again):
        assert [one.choice.keeps_alone for one in found] == [False, True, False, False]
        assert [same(one.own, one.alone) for one in found] == [False, True, False, False]
        assert ["model alone" in one.card() for one in found] == [False, True, False, False]
    for one, (of_alone, of_own, kinds) in zip(homes, seen, strict=False):
        _, validation = home._split(one)
        assert len(of_alone) == len(of_own) == len(validation)
        assert kinds == text_numbers(validation).tolist()


def test_what_is_compared_are_the_answers_of_the_chosen_trials_on_records_held_back(
    banks, monkeypatch
):
    """By hand, from the trials' own adapters and the model's own answers."""
    institutions, order, work, config = banks()
    trained, seen, train = [], [], home.train_at_home

    def spied(work, trainees, plan):
        trained.append(train(work, trainees, plan))
        return trained[-1]

    monkeypatch.setattr(home, "train_at_home", spied)
    monkeypatch.setattr(home, "is_better", lambda *of: seen.append(of[:2]))
    homes = homes_of(institutions, order)
    found = models_at_home(work, homes, config.home, 64)
    alone_trials, _, own_trials, _ = trained
    for i, (one, made) in enumerate(zip(homes, found, strict=True)):
        _, validation = home._split(one)
        chosen = alone_trials[i][(2, 4, 8).index(made.choice.alone.steps)]
        mean = mixed(one.shared, own_trials[i][0], made.choice.weight)
        for adapter, right in zip((chosen, mean), seen[i], strict=True):
            adapter.load_into(work.model)
            said = np.array(_predictions(work.model, work, validation))
            assert (said == validation.targets).tolist() == list(right)
    assert len({right for each in seen for right in each}) > 2


def test_the_rate_that_was_chosen_is_the_rate_of_the_last_training(banks, monkeypatch):
    institutions, order, work, config = banks(**{"home.learning-rate": (1e-6, 0.05)})
    plans, train = [], home.train_at_home

    def spied(work, trainees, plan):
        plans.append((len(trainees), plan.learning_rate))
        return train(work, trainees, plan)

    monkeypatch.setattr(home, "train_at_home", spied)
    found = models_at_home(work, homes_of(institutions, order), config.home, 64)
    trials = [(4, 1e-6), (4, 0.05)]
    own = plans.index(trials[0], 2)
    assert plans[:2] == trials and plans[own : own + 2] == trials
    finished = plans[2:own] + plans[own + 2 :]
    wanted = sorted(
        rate
        for one in found
        for rate in (one.choice.alone.learning_rate, one.choice.own.learning_rate)
    )
    assert sorted(rate for count, rate in finished for _ in range(count)) == wanted


def test_with_too_few_validation_records_the_first_rate_is_the_only_one(banks, monkeypatch):
    institutions, order, work, config = banks(**{"home.learning-rate": (0.01, 0.05)})
    rates, train = [], home.train_at_home

    def spied(work, trainees, plan):
        rates.append(plan.learning_rate)
        return train(work, trainees, plan)

    monkeypatch.setattr(home, "train_at_home", spied)
    (one, *_) = homes_of(institutions, order)
    one = dataclasses.replace(one, shard=one.shard.select(range(77)))
    (found,) = models_at_home(work, [one], config.home, 64)
    assert set(rates) == {0.01} and found.choice.own == Setting(8, 0.01)


def test_models_are_the_same_when_they_are_made_again(banks):
    institutions, order, work, config = banks()
    first, again = (
        models_at_home(work, homes_of(institutions, order), config.home, 64) for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        assert same(a.alone, b.alone) and same(a.own, b.own) and a.choice == b.choice
    assert len({a.own["base_model.model.classifier.weight"].sum().item() for a in first}) == 4


@pytest.mark.parametrize(
    ("records", "chooses", "held"),
    [(1, False, 0), (37, False, 0), (38, False, 8), (77, False, 15), (78, True, 16)],
)
@pytest.mark.parametrize(("method", "weight"), [("interpolate", 0.5), ("fine-tune", 1.0)])
def test_an_institution_with_under_sixteen_validation_records_chooses_nothing(
    banks, records, chooses, held, method, weight, monkeypatch
):
    institutions, order, work, config = banks(**{"home.method": method})
    compared: list[tuple[int, ...]] = []
    monkeypatch.setattr(home, "is_better", lambda *of: compared.append(tuple(map(len, of))))
    calls, measure = [], home.expected_errors
    monkeypatch.setattr(home, "expected_errors", lambda *a: calls.append(a) or measure(*a))
    one = institutions[0].home(institutions[0].released(order))
    one = dataclasses.replace(one, shard=one.shard.select(range(records)))
    (found,) = models_at_home(work, [one], config.home, 64)
    assert bool(calls) == chooses and compared == [(held, held, held)] * bool(held)
    if not chooses:
        setting = Setting(8, 0.02)
        assert found.choice == Choice(alone=setting, own=setting, weight=weight, held_back=held)
    assert found.choice.weight >= 0.5 and not same(found.own, one.shared)
    (alone,) = models_alone(work, [one], config.home, 64)  # as for an own model under DP
    assert alone.held_back == held * chooses


@pytest.fixture
def diverges(monkeypatch):
    """Makes a training, by its number, give the first institution no numbers; gives the calls."""

    def make(number):
        calls, train = [], home.train_at_home

        def broken(work, trainees, plan):
            calls.append(trainees)
            adapters = train(work, trainees, plan)
            if len(calls) == number:
                adapters[0][0] = adapters[0][0].updated(
                    {n: t * np.nan for n, t in adapters[0][0].items()}
                )
            return adapters

        monkeypatch.setattr(home, "train_at_home", broken)
        return calls

    return make


def test_a_model_alone_without_numbers_is_compared_with_nothing(banks, diverges):
    institutions, order, work, config = banks()
    diverges(2)  # on all records
    with pytest.raises(InputError, match=r"no finite values after . steps at 0\.02.*lower home"):
        models_at_home(work, homes_of(institutions, order), config.home, 64)


def test_a_training_that_ends_in_no_numbers_leaves_the_shared_adapter(banks, diverges):
    institutions, order, work, config = banks()
    calls = diverges(4)  # the own model, on all records
    found = models_at_home(work, homes_of(institutions, order), config.home, 64)
    assert len(calls) == 4 and found[0].choice.weight == 0.0
    assert same(found[0].own, order.adapter)
    assert all(one.choice.weight >= 0.5 for one in found[1:])


def test_a_trial_that_diverges_is_not_compared_where_no_setting_is_chosen(banks, monkeypatch):
    """The shared adapter is, which is then the own model."""
    institutions, order, work, config = banks()
    one = institutions[0].home(institutions[0].released(order))
    one = dataclasses.replace(one, shard=one.shard.select(range(40)))
    seen, train = [], home.train_at_home

    def broken(work, trainees, plan):
        found = train(work, trainees, plan)
        if not same(trainees[0].start, work.start):
            found = [[a.updated({n: t * np.nan for n, t in a.items()}) for a in found[0]]]
        return found

    monkeypatch.setattr(home, "train_at_home", broken)
    monkeypatch.setattr(home, "is_better", lambda *of: seen.append(of))
    (found,) = models_at_home(work, [one], config.home, 64)
    _, validation = home._split(one)
    order.adapter.load_into(work.model)
    right = np.array(_predictions(work.model, work, validation)) == validation.targets
    ((_, of_own, _),) = seen
    assert list(of_own) == right.tolist() and same(found.own, order.adapter)
    assert found.choice.weight == 0.0


@pytest.mark.parametrize("method", ["interpolate", "fine-tune"])
def test_a_trial_that_diverges_is_not_chosen(banks, monkeypatch, method):
    """An error that is no number counts as infinite: numpy would take it for the least."""
    institutions, order, work, config = banks(**{"home.method": method})
    measure = home.expected_errors

    def diverged(work, adapters, shards, physical_batch):
        losses = measure(work, adapters, shards, physical_batch)
        return [
            v if same(a, order.adapter) else np.nan for a, v in zip(adapters, losses, strict=True)
        ]

    monkeypatch.setattr(home, "expected_errors", diverged)
    one = institutions[0].home(institutions[0].released(order))
    (found,) = models_at_home(work, [one], config.home, 64)
    assert found.choice.weight == 0.0
    assert same(found.own, order.adapter)


def test_alone_starts_without_the_residual_of_a_strategy_and_own_with_it(banks, monkeypatch):
    institutions, order, work, config = banks(residual=True)
    starts, train = [], home.train_at_home

    def spied(work, trainees, plan):
        starts.append([one.start for one in trainees])
        return train(work, trainees, plan)

    monkeypatch.setattr(home, "train_at_home", spied)
    found = models_at_home(work, homes_of(institutions, order), config.home, 64)
    alone, _, own, _ = starts
    assert [len(each) for each in starts] == [4, 4, 4, 4]
    assert all(same(start, work.start) for start in alone)
    head = work.start.only(("head",))
    assert len(head) and all(same(start, order.adapter.updated(head)) for start in own)
    residual = order.adapter.only(("residual",))
    assert len(residual)
    for models_of_one in found:
        assert not len(models_of_one.alone.only(("residual",)))
        assert same(models_of_one.own.only(("residual",)), residual)


def test_local_parts_of_an_institution_are_where_its_own_model_starts(banks):
    institutions, order, work, _ = banks(**{"federation.strategy": "fedsa"})
    for i, institution in enumerate(institutions):
        kept = moved(work.start, 20 + i).only(("B",))
        institution._local_parts("a1").store(1, kept)
    homes = homes_of(institutions, order)
    for i, one in enumerate(homes):
        assert same(one.shared.only(("B",)), moved(work.start, 20 + i).only(("B",)))
        assert same(one.shared.only(("A", "head")), order.adapter.only(("A", "head")))
    together = institutions[0].models_at_home(homes)
    alone = [institutions[0].models_at_home([one])[0] for one in homes]
    for a, b in zip(together, alone, strict=True):
        assert a.choice == b.choice
        for n in a.own:
            torch.testing.assert_close(a.own[n], b.own[n], rtol=0, atol=1e-3)


def _predictions(model, work, shard):
    batch = work.task.collate(shard, range(len(shard)))
    with torch.no_grad():
        logits = model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits.argmax(1).tolist()


@pytest.mark.parametrize("residual", [False, True])
def test_the_own_adapter_opens_with_peft_and_predicts_what_was_reported(banks, residual):
    institutions, order, work, config = banks(residual=residual)
    for i, answer in enumerate(home_cohort.compare_at_home([(one, order) for one in institutions])):
        directory = institutions[i].directory / "own"
        base = models.load_base(
            config.model.name,
            dtype="fp32",
            quantization="none",
            task="classification",
            num_labels=len(work.labels),
        )
        opened = PeftModel.from_pretrained(base.model, directory, trust_remote_code=False)
        shard = records.load(config).held_out(i)
        assert answer.institution == institutions[i].name
        assert _predictions(opened, work, shard) == answer.metrics["own"]
        order.adapter.load_into(work.model)
        assert _predictions(work.model, work, shard) == answer.metrics["shared"]
        assert answer.metrics["weight"] in WEIGHTS
        card = " ".join((directory / "README.md").read_text().split())
        assert "must not leave the institution" in card and "without differential privacy" in card


@pytest.mark.parametrize("place", ["records", "training", "saving"])
def test_an_institution_that_fails_does_not_end_the_comparison_of_the_others(
    banks, place, monkeypatch
):
    institutions, order, *_ = banks()
    calls = [(one, order) for one in institutions]
    whole = home_cohort.compare_at_home(calls)
    failing, take = institutions[1].name, Institution.home
    if place == "saving":
        institutions[1] = dataclasses.replace(
            institutions[1], directory=institutions[1].ledger_path / "x"
        )
        institutions[1].ledger_path.parent.mkdir(parents=True, exist_ok=True)
        institutions[1].ledger_path.write_text("a file where a directory should be")
        calls[1] = (institutions[1], order)

    def broken(self, order):
        if self.name == failing and place == "records":
            raise OSError("the records cannot be read")
        found = take(self, order)
        if self.name == failing and place == "training":
            return dataclasses.replace(found, shard=found.shard.select([]))
        return found

    monkeypatch.setattr(Institution, "home", broken)
    found = home_cohort.compare_at_home(calls)
    assert isinstance(found[1], Exception)
    for i in (0, 2, 3):
        assert found[i] == whole[i]


def test_the_source_of_an_institution_is_its_own(banks):
    institutions, order, *_ = banks()
    draws = {
        tuple(one.source.child("validation").permutation(96))
        for one in homes_of(institutions, order)
    }
    assert len(draws) == 4


def test_a_second_adapter_stands_beside_the_frozen_shared_one(banks):
    """The shared product is a residual, and counts as before until the second one is trained."""
    institutions, order, work, config = banks(**{"home.method": "dual", "adapter.alpha": 6.0})
    one = institutions[0].home(institutions[0].released(order))
    start = home.beside(one.shared, work)
    scale = 6.0 / config.adapter.rank
    for path, layer in start.layers().items():
        shared = one.shared.factors(path)
        assert not layer.b.any()
        residual_a, residual_b = layer.residual
        assert torch.allclose(residual_b @ residual_a, scale * shared.b @ shared.a, atol=1e-6)
    (before, after) = (
        home_training.expected_errors(work, [adapter], [one.shard], 64)[0]
        for adapter in (one.shared, start)
    )
    assert after == pytest.approx(before, rel=1e-4)
    (found,) = models_at_home(work, [one], config.home, 64)
    assert same(found.own.only(("residual",)), start.only(("residual",)))
    if found.choice.weight:
        assert any(layer.b.any() for layer in found.own.layers().values())
