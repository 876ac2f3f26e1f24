"""Own models under DP in a simulation: what is trained, what is charged, what is said of it."""

import json
from pathlib import Path

import pytest
import torch

from client import home, home_cohort, private_home
from client.institution import Institution
from client.ledger import Ledger
from fedlora.data import records
from fedlora.errors import InputError, Refusal
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.privacy import composition
from fedlora.privacy.composition import Event
from fedlora.rounding import at_most
from fedlora.wire.messages import EvaluateOrder, Query
from server import privacy_statement
from simulation import check
from tests.client.test_home_training import moved, with_residual

PRIVATE = {"home.method": "interpolate", "home.steps": 4, "home.epsilon": 2.0}


@pytest.fixture
def banks(tiny_config):
    """Two of four banks with ledgers, and the order to compare their models after a run."""

    def make(residual=False, **values):
        config = tiny_config(**(PRIVATE | values))
        work = trainable.load(config, records.load(config).labels)
        released = moved(work.start, 5)
        if residual:
            released = with_residual(released, work)
        institutions = [Institution.locate(config, i) for i in range(2)]
        for one in institutions:
            one.hello(Query(run="a1", first=True, participations=3))
        return institutions, EvaluateOrder(run="a1", round=3, save=True, adapter=released)

    return make


@pytest.fixture
def trained(monkeypatch):
    """What was trained at home without DP, in order."""
    found, train = [], home.train_at_home

    def spied(work, trainees, plan):
        found.extend(trainees)
        return train(work, trainees, plan)

    monkeypatch.setattr(home, "train_at_home", spied)
    return found


def compare(institutions, order):
    return home_cohort.compare_at_home([(one, order) for one in institutions])


def ledger_of(institution):
    with Ledger.open(institution.ledger_path) as ledger:
        return ledger.show()


def card_of(institution):
    return " ".join((institution.directory / "own" / "README.md").read_text().split())


def test_each_own_model_is_charged_to_the_ledger_of_its_institution_and_its_card_says_so(banks):
    institutions, order = banks()
    for one, answer in zip(institutions, compare(institutions, order), strict=True):
        shown = ledger_of(one)
        (charge,) = shown["entries"]
        assert charge["run"].startswith("home:a1:") and charge["answered"]
        assert (charge["steps"], charge["sample_rate"], charge["round"]) == (4, 0.25, 4)
        assert 1.9 < shown["epsilon"] <= 2.0
        assert f"epsilon {at_most(shown['epsilon'])} at delta 0.0001" in card_of(one)
        assert "must not leave" not in card_of(one)
        assert "The ledger has no charge of that run." in card_of(one)
        assert (answer.metrics["own_steps"], answer.metrics["weight"]) == (4, 1.0)


def test_a_card_counts_the_run_that_its_ledger_was_charged_for(banks):
    institutions, order = banks()
    event = Event(noise_multiplier=2.0, sample_rate=0.5, steps=1, shares=0)
    with Ledger.open(institutions[0].ledger_path) as ledger:
        ledger.charge(
            run_id=order.run,
            round_number=1,
            order_digest="first",
            event=event,
            planned=[event],
            max_steps_of_run=1,
        )
    compare(institutions[:1], order)
    card = card_of(institutions[0])
    assert "The run used the same records. Together with it" in card and "no charge" not in card


def test_a_card_says_that_seeded_noise_protects_nobody(banks):
    for noise, said in (("seeded", True), ("secure", False)):
        institutions, order = banks(**{"privacy.noise": noise, "run-dir": f"run-{noise}"})
        compare(institutions[:1], order)
        assert ("this training protects nobody" in card_of(institutions[0])) == said


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_model_under_dp_is_the_only_own_model_that_is_trained(banks, trained):
    institutions, order = banks()
    work = institutions[0]._load()
    compare(institutions, order)
    starts = [one.start for one in trained]
    assert len(starts) == 2 * 2  # the model alone, to choose and at the end
    assert all(torch.equal(start[n], t) for start in starts for n, t in work.start.items())


def test_the_own_model_is_the_one_that_the_ledger_answered_also_when_it_is_asked_again(banks):
    institutions, order = banks(**{"privacy.noise": "secure"})
    owns = []
    for _ in range(2):
        compare(institutions, order)
        owns.append([AdapterState.open(one.directory / "own") for one in institutions])
    assert all(len(ledger_of(one)["entries"]) == 1 for one in institutions)
    for first, again in zip(*owns, strict=True):
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
        assert not all(torch.equal(order.adapter[n], t) for n, t in first.items() if n in first)


def test_seeded_noise_at_home_is_that_of_no_round_of_the_run(banks):
    institutions, _ = banks()
    config = institutions[0].config
    alone = private_home.config_at_home(config, delta=1e-4, accountant="rdp")
    order = private_home.order_at_home(alone, "a1", "0" * 64, institutions[0]._load().start)
    assert order.round == config.federation.rounds + 1 == alone.federation.rounds


def test_an_own_model_has_all_its_noise_also_after_a_run_of_secure_aggregation(banks):
    secure = {
        "privacy.trust": "secure-aggregation",
        "privacy.honest": 2,
        "privacy.colluding": 1,
        "federation.weighting": "public-size",
    }
    institutions, order = banks(**secure)
    compare(institutions, order)
    for one in institutions:
        shown = ledger_of(one)
        assert [entry["shares"] for entry in shown["entries"]] == [0]
        assert shown["epsilon"] == shown["epsilon_alone"] <= 2.0


def test_a_model_alone_that_cannot_be_trained_costs_no_budget(banks, monkeypatch):
    """The remedy it names is another order, which would be charged again."""
    train = home.train_at_home

    def diverges(work, trainees, plan):
        return [
            [AdapterState({n: t * torch.nan for n, t in one.items()}) for one in adapters]
            for adapters in train(work, trainees, plan)
        ]

    monkeypatch.setattr(home, "train_at_home", diverges)
    institutions, order = banks()
    for one, answer in zip(institutions, compare(institutions, order), strict=True):
        assert isinstance(answer, InputError) and "no finite values" in str(answer)
        assert ledger_of(one)["entries"] == []


def test_a_ledger_that_refuses_leaves_one_institution_out_and_no_other(banks, trained):
    institutions, order = banks(**{"home.epsilon": 8.0})
    ledger = institutions[1].ledger_path
    with Ledger.open(ledger) as opened:
        shard = institutions[1]._records()
        opened.bind(shard.fingerprint, "record")
        event = Event(noise_multiplier=0.45, sample_rate=0.25, steps=3)
        assert 10 < composition.epsilon((event,), opened.delta, opened.accountant) < 16
        opened.charge(
            run_id="earlier",
            round_number=1,
            order_digest="d",
            event=event,
            planned=(event,),
            max_steps_of_run=3,
        )
    found = compare(institutions, order)
    assert isinstance(found[1], Refusal) and found[1].code == "budget-exhausted"
    assert not (institutions[1].directory / "own").exists()
    assert not isinstance(found[0], Exception)
    whole = len(institutions[0]._records())
    records_of = [len(one.shard) for one in trained]
    assert max(records_of) == whole and records_of.count(whole) == 1  # nothing of the refused one


@pytest.mark.parametrize(
    "values",
    [
        {"federation.strategy": "svd", "adapter.ranks": "2,8,4,1"},
        {"federation.strategy": "exact", "residual": True},
        {"federation.strategy": "fedsa"},
        {"federation.strategy": "rolora"},
        {"home.method": "dual", "federation.weighting": "noised-size"},
    ],
    ids=str,
)
def test_every_kind_of_run_trains_own_models_under_dp(banks, values):
    values = {**values}
    residual = values.pop("residual", False)
    whole = {"federation.server-optimizer": "none", "federation.server-learning-rate": 1.0}
    institutions, order = banks(residual=residual, **whole, **values)
    for one, answer in zip(institutions, compare(institutions, order), strict=True):
        assert not isinstance(answer, Exception), answer
        own = AdapterState.open(one.directory / "own")
        assert len(ledger_of(one)["entries"]) == 1
        start = one._load().start
        if residual:  # is saved inside of the factors
            assert own.rank > start.rank
        else:
            assert not any(torch.equal(own[name], order.adapter[name]) for name in start)


def test_beside_an_own_model_under_dp_no_trial_is_trained_that_nobody_compares(
    banks, trained, monkeypatch
):
    monkeypatch.setattr(home, "HOME_COMPARES_ON", 2)  # all of them hold records back
    monkeypatch.setattr(home, "HOME_CHOOSES_ON", 10_000)
    institutions, order = banks()
    whole = [len(one._records()) for one in institutions]
    assert not any(isinstance(answer, Exception) for answer in compare(institutions, order))
    # the models alone, once, on all records
    assert [len(one.shard) for one in trained] == whole


# The limit.


def test_only_an_institution_that_trains_an_own_model_needs_budget_for_it(banks):
    for chosen, needs in ((1, [1, 0]), (2, [1, 0]), (0, [1, 1])):  # of four: the first; and third
        institutions, _ = banks(**{"home.institutions": chosen, "run-dir": f"chosen-{chosen}"})
        for one, events in zip(institutions, needs, strict=True):
            with Ledger.open(one.ledger_path) as ledger:
                assert len(one.events_at_home(40, ledger)) == events


def test_a_ledger_of_a_simulation_has_room_for_the_run_and_the_own_model(banks):
    institutions, _ = banks()
    assert {ledger_of(one)["limit"] for one in institutions} == {10.0}
    other, _ = banks(**{"home.epsilon": float("inf"), "run-dir": "other"})
    assert {ledger_of(one)["limit"] for one in other} == {8.0}


def test_a_limit_below_the_run_and_the_own_model_is_refused_with_a_remedy(tiny_config):
    assert tiny_config(**PRIVATE, **{"privacy.max-epsilon": 10.0}).planned_epsilon == 10.0
    with pytest.raises(InputError) as refused:
        tiny_config(**PRIVATE, **{"privacy.max-epsilon": 9.9})
    assert str(refused.value) == (
        "privacy.max-epsilon is 9.9, below privacy.epsilon + home.epsilon (10); raise it or lower "
        "privacy.epsilon or home.epsilon"
    )


def test_an_institution_by_itself_plans_no_own_model(tiny_config):
    alone = {"data.view": "only:Alpha", "privacy.max-epsilon": 8.0}
    assert tiny_config(**PRIVATE, **alone).planned_epsilon == 8.0


def test_own_models_that_no_noise_brings_to_their_budget_are_refused_before_the_run(
    tiny_config, simulate_run
):
    """Institutions would refuse it one by one, and the others would go on without them."""
    config = tiny_config(**{**PRIVATE, "home.epsilon": 0.001})
    with pytest.raises(InputError) as refused:
        simulate_run(config)
    said = str(refused.value)
    assert "home.epsilon is 0.001, for which no own model can be planned" in said
    assert "raise it, or set it to inf" in said and not Path(config.run_dir).exists()
    assert said in check.describe(config)["refused"]
    home = {**PRIVATE, "home.epsilon": 0.001, "home.method": "none"}
    assert check.describe(tiny_config(**home))["refused"] == []  # nobody trains one


def test_a_run_whose_lasting_ledgers_lack_the_own_model_s_budget_is_refused_before_it_starts(
    tiny_config, simulate_run, tmp_path
):
    limit = {"privacy.ledger": str(tmp_path / "lasting"), "privacy.max-epsilon": 8.6}
    lasting = limit | {"federation.min-updates": 4}
    simulate_run(tiny_config(**lasting, **{"run-dir": str(tmp_path / "once")}))
    more = tiny_config(**lasting, **{"privacy.epsilon": 4.0})
    for wanted in (more, more.replace({**PRIVATE, "home.epsilon": 4.0})):
        institution = Institution.locate(wanted, 0)
        fits = institution.hello(Query(run="b1", first=True, participations=3)).fits
        assert fits != wanted.home.private
    with pytest.raises(InputError) as refused:
        simulate_run(more.replace({**PRIVATE, "home.epsilon": 4.0}))
    assert "with own models at home.epsilon 4" in str(refused.value)
    assert "lower privacy.epsilon or home.epsilon" in str(refused.value)
    assert not Path(more.run_dir).exists()


def test_a_run_states_the_budget_of_own_models_and_spends_what_it_planned(
    tiny_config, simulate_run
):
    config = tiny_config(**PRIVATE)
    result = simulate_run(config)
    joining = result["joining"]
    assert joining["epsilon"] == 2.0 and "not_compared" not in joining
    for name, found in joining["institutions"].items():
        assert (found["own_steps"], found["weight"]) == (4, 1.0)
        with Ledger.open(Path(config.run_dir) / "ledgers" / f"{name}.db") as ledger:
            runs = sorted(ledger.runs())
            home_run = next(run for run in runs if run.startswith("home:"))
            events = ledger.history(home_run)
            assert len(runs) == 2 and ledger.spent() <= 10.0
            assert composition.epsilon(events, ledger.delta, ledger.accountant) <= 2.0
    privacy = json.loads((Path(config.run_dir) / "privacy.json").read_text())
    assert "home" not in json.dumps(privacy)  # seeded: nothing is promised
    secure = config.replace({"privacy.noise": "secure"})
    said = privacy_statement.promise(secure, follows=False)["protects"]
    assert "home.epsilon 2 on top. Every figure here is of the time before" in said
    without = privacy_statement.promise(
        secure.replace({"home.epsilon": float("inf")}), follows=False
    )
    assert "home" not in without["protects"]
